"""How many pages the two pools get: the one policy that all executors share."""

from __future__ import annotations

from gptoss_compile.config import ModelConfig


def pool_sizes(config: ModelConfig, *, page_size: int, window_ring: int, max_context: int, item_bytes: int,
               num_pages: int | None, max_num_seqs: int, memory: int) -> tuple[int, int]:
    """(pages, window pages), the null page of each included.

    num_pages counts the usable pages of full-attention layers; None: enough for `max_num_seqs` sequences of
    `max_context` tokens, or as many as `memory` bytes hold. Window layers get, for every sequence, the pages of one
    window twice (the live one and one kept by the prefix cache), and one ring for the step in flight; never more than
    the full layers have, whose pages run out first then, but always one window.
    """
    per_page = 2 * config.num_kv_heads * page_size * config.head_dim * item_bytes
    windows = -(-config.sliding_window // page_size) + 1
    wanted_window = 2 * max_num_seqs * windows + window_ring
    full_layers = config.windowed.count(False)
    if num_pages is None:
        left = memory - wanted_window * per_page * config.windowed.count(True)
        enough = max_num_seqs * -(-max_context // page_size)
        num_pages = min(enough, left // (per_page * full_layers)) if full_layers else enough
        if num_pages < 1:
            raise ValueError(f"{memory / 2**30:.1f} GiB are left for the KV cache, too little for one page beside the "
                             f"window layers; lower --max-num-seqs (now {max_num_seqs}) or use a larger device")
    if num_pages < 1:
        raise ValueError(f"--kv-pages must be at least 1, found {num_pages}")
    return num_pages + 1, max(min(wanted_window, num_pages), windows) + 1
