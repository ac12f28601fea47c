"""How pairs get to the trainer of transformers: batches by token count, and what is left alone."""

from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm
from transformers import Trainer
from transformers.trainer_utils import seed_worker

from mossrlhf.data import TokenBatches, TokenBatchSampler
from mossrlhf.reward_trainer.pairs import PairRows


class PairLoader(Trainer):
    """A trainer whose records are pairs; see `RewardTrainer`.

    Source: ours.
    """

    batches: TokenBatches | None = None

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the batches of training, by token count where `batches` is given.

        Raises:
            ValueError: where they are to be cut by token count, and their number is not known.
        """
        if self.batches is None:
            return super().get_train_dataloader()
        from accelerate.data_loader import DataLoaderShard

        dataset, args = self.train_dataset, self.args
        if not isinstance(dataset, Sized) or isinstance(dataset, IterableDataset):
            raise ValueError(
                f"train_dataset: got a {type(dataset).__name__}, which does not say how many pairs "
                "it has, so batches cannot be cut by length; leave batches=None, or read it first"
            )
        quiet = args.disable_tqdm or not self.is_world_process_zero()
        sampler = TokenBatchSampler(
            pair_lengths(self.data_collator, dataset, quiet),  # type: ignore[arg-type]
            self.batches,
            seed=args.seed if args.data_seed is None else args.data_seed,
            processes=args.world_size,
            process=args.process_index,
        )
        workers = args.dataloader_num_workers
        # Not by `accelerator.prepare`, which would deal out what the sampler has dealt out.
        return DataLoaderShard(
            dataset,
            device=self.accelerator.device,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            worker_init_fn=partial(seed_worker, num_workers=workers, rank=args.process_index),
        )

    # Pairs that are held out may do without margins and α.
    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return the batches of an evaluation.

        Args:
            eval_dataset: pairs, or the name of those; None for the trainer's.
        """
        with self._evaluating():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Return the batches of `predict`.

        Args:
            test_dataset: pairs.
        """
        with self._evaluating():
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        rows: Any = getattr(self, "data_collator")  # noqa: B009  (mypy has not seen it yet)
        self.data_collator = replace(rows, optional=True)
        try:
            yield
        finally:
            self.data_collator = rows

    # What `remove_unused_columns` asks for is done by the collator, which takes what it needs.
    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        return dataset

    def _get_collator_with_removed_columns(self, data_collator: Any, *_: Any, **__: Any) -> Any:
        return data_collator


def pair_lengths(
    rows: PairRows, dataset: Sequence[Mapping[str, Any]], quiet: bool = True
) -> list[int]:
    """Return the tokens of each pair's longer sequence.

    Args:
        rows: what is made of records.
        dataset: the pairs.
        quiet: whether to show no bar.

    Source: ours; encoded one by one, which the collator remembers.
    """
    indices = tqdm(range(len(dataset)), "measuring pairs", disable=quiet, leave=False)
    masks = (rows.collator([dataset[i]])["attention_mask"] for i in indices)
    return [int(mask.sum(1).max()) for mask in masks]
