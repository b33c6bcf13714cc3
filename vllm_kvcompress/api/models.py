"""What the JSON endpoints answer. All times are Unix seconds, all sizes bytes over all ranks."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

State = Literal["running", "waiting", "finished"]


class InForce(BaseModel):
    """Settings in force for a request."""

    budget: int | None
    keep_ratio: float | None
    prune_after: int
    context_tokens: int | None


class BandOfRequest(BaseModel):
    """What a request holds in one KV cache group."""

    band: int = Field(description="Band of layers; -1 for layers that keep every token.")
    group: int
    layers: int
    blocks: int = Field(description="Blocks held; shared ones count whole.")
    tokens_kept: int = Field(description="Slots that hold a token, or several pooled ones.")
    tokens_removed: int
    tokens_merged: int = Field(description="Slots saved by pooling tokens.")


class Account(BaseModel):
    """Memory account of one request; of a finished one, as it was at its end."""

    id: str = Field(description="The engine's id: that of the response and a suffix.")
    engine: int
    state: State
    finish_reason: str | None
    method: str = Field(description="Method in force; none if nothing is compressed.")
    settings: InForce
    arrival: float
    queue_seconds: float = Field(description="From arrival until it was first scheduled.")
    prefill_seconds: float | None = Field(description="From then to the first token.")
    decode_seconds: float | None = Field(description="From the first token on.")
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int | None = Field(description="Prompt tokens found in the prefix cache.")
    preemptions: int
    compactions: int = Field(description="Of single groups, repeated ones included.")
    bytes_held: int = Field(description="A page that n requests hold counts 1/n for each.")
    bytes_peak: int = Field(description="Most it ever held; shared pages count whole.")
    bytes_uncompressed: int = Field(description="What it would hold uncompressed.")
    bytes_uncompressed_peak: int = Field(description="The most of that; shared pages count whole.")
    ratio: float | None = Field(description="bytes_uncompressed / bytes_held.")
    bands: list[BandOfRequest]


class Moment(BaseModel):
    """What a request held at one time; shared pages count whole."""

    time: float
    tokens: int = Field(description="Tokens computed so far.")
    bytes_held: int
    bytes_uncompressed: int
    blocks: list[int] = Field(description="Blocks held per group.")


class AccountWithHistory(Account):
    """Memory account of one request, with its course."""

    history: list[Moment] = Field(
        description="Before and after its compactions, and at its start and end."
    )


class Accounts(BaseModel):
    """Memory accounts of several requests."""

    time: float
    requests: list[Account] = Field(description="By arrival, newest first.")
    total: int = Field(description="Requests in this state, of which some may not be listed.")


class Pool(BaseModel):
    """Blocks of the pool; used + cached + free + null = blocks."""

    blocks: int
    used: int = Field(description="Held by a request.")
    cached: int = Field(description="Held by no request, with a hash in the prefix cache.")
    free: int
    null: int
    bytes: int
    used_bytes: int
    cached_bytes: int
    free_bytes: int


class Counts(BaseModel):
    """Requests by state."""

    running: int
    waiting: int = Field(description="Preempted ones included.")
    preempted: int = Field(description="Waiting again after a preemption.")


class Totals(BaseModel):
    """Counted since the engine started."""

    requests: dict[str, int] = Field(description="Finished requests by method.")
    compactions: dict[str, int] = Field(description="Of single groups, by method.")
    tokens_removed: int = Field(description="Summed over groups, as is tokens_merged.")
    tokens_merged: int
    blocks_freed: int
    preemptions: int
    compaction_seconds: float = Field(description="Host time of one rank.")
    prompt_tokens: int = Field(description="Of requests that put out a token.")
    output_tokens: int


class Engine(BaseModel):
    """One engine."""

    engine: int
    time: float = Field(description="When this was so.")
    pool: Pool
    requests: Counts
    bytes_held: int
    bytes_uncompressed: int
    ratio: float | None
    totals: Totals


class Summary(BaseModel):
    """All engines."""

    time: float
    engines: list[Engine]


class Band(BaseModel):
    """Layers that share a budget."""

    band: int
    layers: list[int]
    budget: int | None
    keep_ratio: float | None
    groups: list[int]
    bytes_per_block: int


class Config(BaseModel):
    """What does not change while the server runs."""

    version: str
    vllm_version: str
    model: str
    block_size: int
    settings: dict[str, Any]
    methods: list[str] = Field(description="What a request may ask for.")
    max_budget: int | None
    max_model_len: int
    bands: list[Band]
    pool_blocks: int = Field(description="Of one engine.")
    pool_bytes: int
    engines: int
