"""Dialogue data: readers for common formats, chat templates, collation."""

from mossrlhf.data import formats
from mossrlhf.data.collate import (
    PairCollator,
    SFTCollator,
    TokenBatches,
    TokenBatchSampler,
    pad,
    pad_id,
)
from mossrlhf.data.formats import DataError
from mossrlhf.data.prompts import (
    PromptBatch,
    Shuffled,
    dialogue_template,
    encode_prompt,
    encode_response,
    encode_text,
    overlong_prompts,
    prompt_batch,
    prompt_encodings,
    require_fitting_prompts,
    require_record,
    require_records,
    set_dialogue_template,
    without_overlong,
)
from mossrlhf.data.readers import (
    LazyRecords,
    load_pairs,
    load_prompts,
    load_sft,
    stream_pairs,
    stream_prompts,
    stream_sft,
)

__all__ = [
    "DataError", "LazyRecords", "PairCollator", "PromptBatch", "SFTCollator", "Shuffled",
    "TokenBatchSampler", "TokenBatches", "dialogue_template", "encode_prompt", "encode_response",
    "encode_text", "formats", "load_pairs", "load_prompts", "load_sft", "overlong_prompts", "pad",
    "pad_id", "prompt_batch", "prompt_encodings", "require_fitting_prompts", "require_record",
    "require_records", "set_dialogue_template", "stream_pairs", "stream_prompts", "stream_sft",
    "without_overlong",
]  # fmt: skip
