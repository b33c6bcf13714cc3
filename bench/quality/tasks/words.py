"""English words for keys and word lists; RULER takes its own from the package wonderwords."""

from __future__ import annotations

from random import Random

NOUNS = tuple(
    """anchor apple arch artist aunt autumn badge bakery balcony band barn basket beach beard bell
    bench berry bicycle bird blanket boat bottle bowl branch bread brick bridge brother brush bucket
    butter button cabin cable camera camp candle canyon carpet castle cattle cave cedar chain chair
    chalk cheese cherry chest chicken church circle citizen clay cliff clock cloth cloud coach coast
    coffee coin copper corner cotton cousin cradle crane crop crowd crown curtain dancer daughter
    deer desert desk diamond dinner doctor dolphin donkey door dragon drawer dream drum duck eagle
    engine evening farmer feather fence ferry field finger flag flame flower flute forest fountain
    friend frog garden gate giant glass glove goat grape guitar hammer harbor hat helmet hill honey
    horse hotel island jacket jewel judge kettle kitchen kite ladder lake lamp lemon letter library
    lion lizard magnet maple market meadow medal melon mirror monkey morning mountain mouse museum
    napkin needle nephew notebook oak ocean olive onion orange orchard oven owl paint palace paper
    parade parrot peach pearl pencil pepper piano pillow pilot planet plate pocket pony potato
    prince pumpkin puzzle queen quilt rabbit radio raven ribbon rice river rocket roof rope rose
    sailor salad scarf school seed sheep shelf shell ship shoe shoulder singer sister sled smoke
    snail soap soldier spider spoon square stable staircase stamp station stone storm stove
    student sugar summer sweater table tailor teacher temple tent theater thread thunder ticket
    tiger tomato tower trail train tree truck trumpet tunnel turtle uncle valley vase village
    violin wagon wallet walnut water whale wheat wheel whistle window winter wolf wood yard zebra
    """.split()  # noqa: SIM905 (a list of one-word lines is no easier to read)
)

ADJECTIVES = tuple(
    """able ancient angry average awake bashful bitter bold brave brief bright broad busy calm
    careful cheap cheerful clever cloudy cold common cool crisp curious damp dapper dark dear deep
    dry dusty eager early easy elegant empty even faint fair famous fancy fast fierce fine firm
    flat fond fresh full funny gentle glad golden good grand gray great green happy hard harsh
    heavy helpful high hollow honest huge humble hungry icy jolly keen kind large late lazy
    light little lively lonely long loose loud lucky mad mellow merry mild modern narrow neat
    nervous new nice noisy odd old open pale patient plain polite poor proud pure quick quiet
    rapid rare ready rich ripe rough round royal rude rusty sad safe salty scarce shallow sharp
    shiny short shy silent silly simple sleepy slim slow small smart smooth soft solid sour
    spicy steady steep stiff strange strict strong sunny sweet swift tall tame tasty tender thick
    thin thirsty tidy tight tiny tired tough true upset useful vast violet warm weak wealthy wet
    wicked wide wild wise wooden worried young zealous
    """.split()  # noqa: SIM905 (a list of one-word lines is no easier to read)
)

VERBS = tuple(
    """accept admire agree allow answer appear argue arrive ask bake beg believe belong borrow
    bounce bow breathe bring build burn buy call carry catch chase choose clap clean climb collect
    compare complain cook copy count cover crawl create cross cry cure cut dance deliver describe
    dig divide draw drink drive drop earn eat enjoy enter escape explain explore fail fall fasten
    feed fetch fight find float flow fly fold follow forget forgive gather give glow grow guess
    hear hide hold hop hunt hurry imagine improve invent invite join jump keep kick knit knock
    know laugh lead lean learn leave lend lift listen look lose love manage march measure meet
    melt mend mix move notice obey offer open order pack pass pay perform pick plan plant play
    point polish pour practice praise prepare promise protect pull push race reach read receive
    remember repair reply rescue rest ride ring rinse roll row run sail save scatter search sell
    send settle sew shake share shine shout sing sit sketch sleep slide smell smile speak spend
    spill spread stand stare start stay stir stop study swim swing taste teach tear tell think
    throw tie touch travel trust try turn twist visit wait wake walk wander want warn wash watch
    wave wear whisper win wish wonder work write yawn
    """.split()  # noqa: SIM905 (a list of one-word lines is no easier to read)
)

WORDS = tuple(sorted({*NOUNS, *ADJECTIVES, *VERBS}))


def key_word(random: Random) -> str:
    """An adjective and a noun, as RULER names its needles."""
    return f"{random.choice(ADJECTIVES)}-{random.choice(NOUNS)}"


def sample_words(random: Random, count: int) -> list[str]:
    """Different words; beyond the list, pairs of an adjective and a noun."""
    if count <= len(WORDS):
        return random.sample(WORDS, count)
    pairs = [f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS]
    if count > len(WORDS) + len(pairs):
        raise ValueError(f"{count} words are wanted and there are {len(WORDS) + len(pairs)}.")
    words = [*WORDS, *random.sample(pairs, count - len(WORDS))]
    random.shuffle(words)
    return words
