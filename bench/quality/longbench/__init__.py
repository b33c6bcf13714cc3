"""LongBench (Bai et al., arXiv 2308.14508): its metrics and its files, as tasks."""
