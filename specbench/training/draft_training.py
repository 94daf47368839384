"""DraftTraining: one LightningModule that trains any draft method.

One Lightning batch is one optimiser step: a lazy handle over its micro-batches. Every micro-batch adds a SUM of
weighted terms; gradients are divided once by the sum of weights over all ranks and micro-batches, so long and short
conversations, one GPU and eight, few and many micro-batches give the same step.

Axes: B batch, N blocks, K slots.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from specbench.blocks import Batch, with_anchors
from specbench.data.loading.target_cache import TargetCache, TrainingStep
from specbench.drafts.draft import Draft
from specbench.drafts.installed import checked, full_name, method_named
from specbench.drafts.on_policy import OnPolicy
from specbench.files.atomic import plain
from specbench.files.redaction import redacted
from specbench.files.torch_checkpoints import read_checkpoint
from specbench.losses.objective import Loss, Objective
from specbench.metrics.slots import SlotMetrics
from specbench.models.backbone import Backbone
from specbench.models.embedding_head import Tables
from specbench.models.target import Target
from specbench.ranges import (
    AboveZero,
    AtLeastZero,
    Betas,
    Count,
    LearningRate,
    Seed,
    Share,
    ShareAboveZero,
    ShareWithin,
    Temperature,
)
from specbench.training.data_wait import DataWait

# What a checkpoint keeps of the target's tables, where it keeps them.
TABLES = ("embedding", "head", "embedding_scale", "soft_cap", "logit_scale", "bias")


def require_precision(precision: str | int) -> None:
    """Refuse float16, because it needs loss scaling, which these optimiser steps do not have."""
    if str(precision).startswith("16"):
        raise ValueError(
            f"trainer.lightning.precision={precision}: training in float16 needs a loss scale, which is not kept here; "
            "use bf16-mixed or 32-true"
        )


@contextmanager
def ordinary() -> Iterator[None]:
    """Context without gradients, but outside of inference mode, in which a Trainer validates: metrics and lookups from
    validation are also used and changed in training, which is not allowed for inference tensors."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def warmup_cosine(step: int, total: int, warmup: int) -> float:
    """Learning-rate factor: linear from 0 over `warmup` steps, then half a cosine to 0 at `total`."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


def warmup_constant(step: int, total: int, warmup: int, decay: float) -> float:
    """Learning-rate factor: linear from 0 over `warmup` steps, then 1, and linear to 0 over the last `decay` share of
    `total`. With the same warm-up a shorter training is the prefix of a longer one, up to its decay."""
    last = max(1, round(decay * total))
    return min(1.0, (step + 1) / warmup, max(0, total - step) / last)


class DraftTraining(L.LightningModule):
    """A LightningModule that trains a draft with an objective. Defaults are the published recipe.

    One batch is one optimiser step: the losses of its micro-batches are summed and divided once by the sum of their
    weights. So the optimiser step is manual: use `gradient_clip` and the data's `micro_batches_per_step` instead of the
    Trainer's `gradient_clip_val` and `accumulate_grad_batches`, which are refused. A checkpoint stores the draft and
    the loss as plain settings with the weights; `DraftTraining.load_from_checkpoint(PATH)` reads it.

    Args:
        draft: the draft.
        objective: the loss.
        target_tables: embedding and head of the target, from which the loss computes the target's distribution. None:
            those of the target for which the draft was made.
        max_steps: length of the learning-rate schedule in optimiser steps. None: that of the Trainer.
        lr: peak learning rate of AdamW.
        betas: of AdamW.
        weight_decay: of AdamW.
        warmup: share of the steps with a linear warm-up; a cosine to 0 follows.
        warmup_steps: steps of the warm-up in place of that share. None: the share.
        decay: share of the steps at the end over which the rate falls linearly to 0, after a constant rate. None: the
            cosine.
        gradient_clip: maximum norm of the gradient. None: no clipping.
        layer_decay: factor of the learning rate per layer away from the head; 1: off.
        anchor_seed: with the epoch, the seed of the anchors.
        log_every: optimiser steps between logged metrics.
        compile: compile the draft with torch.compile.
        ema: decay of an exponential moving average of the weights, which is then validated, probed and written. None:
            off.
        on_policy: probability that the token before a slot is the draft's own draw instead of the text's
            (specbench.drafts.on_policy). 0: teacher-forced.
        on_policy_ramp: share of the steps over which this probability rises linearly from 0.
        on_policy_temperature: of these draws; 0: the most likely token.
        tables_from: where the target's tables can be read again, {"target": ID, "revision": R} or {"cache": FOLDER}.
            None: a checkpoint contains the tables. A password in an address is not stored; load such a checkpoint with
            `target=`.
    """

    def __init__(
        self,
        draft: Draft,
        objective: Objective,
        *,
        target_tables: Tables | None = None,
        max_steps: int | None = None,
        lr: LearningRate = 6e-4,
        betas: Betas = (0.9, 0.999),
        weight_decay: AtLeastZero = 0.0,
        warmup: Share = 0.04,
        warmup_steps: Count | None = None,
        decay: ShareAboveZero | None = None,
        gradient_clip: AboveZero | None = 1.0,
        layer_decay: ShareAboveZero = 1.0,
        anchor_seed: Seed = 0,
        log_every: Count = 10,
        compile: bool = False,
        ema: ShareWithin | None = None,
        on_policy: Share = 0.0,
        on_policy_ramp: Share = 0.5,
        on_policy_temperature: Temperature = 1.0,
        tables_from: Mapping[str, str | None] | None = None,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False
        if max_steps is not None and max_steps < 1:
            raise ValueError(f"max_steps={max_steps}: train for at least one step")
        if draft.supervision == "unshifted" and (
            "ce" in objective.combination.coefficients or objective.slot_weight.dynamic
        ):
            raise ValueError(
                "supervision=unshifted reaches one token beyond every conversation, where there is no label: "
                "use soft_ce, kl or tv with a static slot weight"
            )
        if draft.candidates is not None:
            objective.require_terms_of_candidates(draft)
        self.draft, self.objective = draft, objective
        # In a tuple, so that the target's tables are neither a second copy in checkpoints nor wrapped by a strategy.
        self._target_tables = (target_tables if target_tables is not None else _tables_of(draft),)
        if tables_from is None and draft.target_source is not None:
            tables_from = dict(zip(("target", "revision"), draft.target_source, strict=True))
        # It stands in checkpoints and in what loggers keep, where a password of a cache's address must not.
        self.tables_from = None if tables_from is None else redacted(dict(tables_from))
        self.recipe = {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay}
        self.max_steps, self.warmup_share, self.gradient_clip = max_steps, warmup, gradient_clip
        self.warmup_steps, self.decay = warmup_steps, decay
        self.layer_decay, self.anchor_seed, self.log_every = layer_decay, anchor_seed, log_every
        self.on_policy, self.on_policy_ramp, self.on_policy_temperature = (
            on_policy,
            on_policy_ramp,
            on_policy_temperature,
        )
        drawn = {"on_policy": on_policy, "on_policy_ramp": on_policy_ramp}
        drawn |= {"on_policy_temperature": on_policy_temperature}
        self.save_hyperparameters(
            plain(
                {
                    "draft": {
                        "class": full_name(type(draft)),
                        "settings": draft.settings,
                        "backbone": dataclasses.asdict(draft.backbone),
                    },
                    "objective": objective.settings,
                    "training": self.recipe
                    | {"max_steps": max_steps, "warmup": warmup, "gradient_clip": gradient_clip}
                    | {"layer_decay": layer_decay, "anchor_seed": anchor_seed, "log_every": log_every}
                    | {"compile": compile, "ema": ema, "tables_from": self.tables_from}
                    # Left out where they are off, so that a training of an earlier version goes on.
                    | (drawn if on_policy else {})
                    | ({} if warmup_steps is None else {"warmup_steps": warmup_steps})
                    | ({} if decay is None else {"decay": decay}),
                }
            )
        )
        self.train_slots = SlotMetrics(draft.block_size)
        self.val_slots = SlotMetrics(draft.block_size)
        self.supervised = 0
        self.data_wait = DataWait()
        self.seconds = 0.0  # in optimiser steps, without reading, validation and probes
        # Share of the training that is done, which a loss can depend on; 1 outside of training.
        self.progress = 1.0
        if ema is not None and not 0 < ema < 1:
            raise ValueError(f"ema={ema}: give a decay between 0 and 1, such as 0.999, or null")
        self.ema, self.average = ema, None
        if ema is not None:
            # The tables are shared, not copied: they are as large as everything else together.
            shared = {} if draft.tables.trainable else {id(draft.tables): draft.tables}
            shared |= {id(tables): tables for tables in draft.target_tables}
            self.average = copy.deepcopy(draft, shared).requires_grad_(False)
        self.sharded = False
        self.compiles = compile
        if compile:
            self.draft.compile()

    @property
    def published(self) -> Draft:
        """The weights that are validated, probed and written: the moving average if there is one."""
        return self.draft if self.average is None else self.average

    def configure_model(self) -> None:
        """Shard weights, gradients and optimiser state over the ranks if the strategy is ModelParallel (FSDP2).

        A draft is one unit, because the objective reads its parameters outside of its forward pass: they are whole from
        the forward pass to the end of the backward pass of a micro-batch, and shards of 1/ranks otherwise.
        """
        mesh = self.device_mesh
        if mesh is None or self.sharded:
            return
        if mesh["tensor_parallel"].size() > 1:
            raise ValueError(
                f"tensor_parallel_size={mesh['tensor_parallel'].size()}: a draft's matrices are not split; give the "
                "strategy tensor_parallel_size=1 and data_parallel_size the number of ranks"
            )
        if self.compiles:
            raise ValueError(
                "recipe.compile=true does not go with a sharded draft; set it to false or use strategy=ddp"
            )
        if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
            raise ValueError(f"torch {torch.__version__} is too old to shard a draft: use 2.13, or strategy=ddp")
        for module in [m for m in (self.draft, self.average) if m is not None]:
            fully_shard(module, mesh=mesh["data_parallel"], reshard_after_forward=False)
            # Sums over ranks; ranks without a supervised slot take part in them.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            module.set_reduce_scatter_unused_params(True)
        self.sharded = True

    @contextmanager
    def whole(self) -> Iterator[Draft]:
        """Context with the published draft and all of its weights on every rank, for decoding. Every rank must
        enter."""
        draft = self.published
        if self.sharded:
            draft.unshard()
            # Gathered weights are in the same memory as the last ones, so a change cannot be detected otherwise.
            if draft.stack is not None:
                draft.stack.forget()
        try:
            yield draft
        finally:
            if self.sharded:
                draft.reshard()

    @property
    def target_tables(self) -> Tables:
        return self._target_tables[0]

    def setup(self, stage: str) -> None:
        require_precision(self.trainer.precision)
        for one in self.trainer.checkpoint_callbacks:
            if getattr(one, "_train_time_interval", None) is not None:
                raise ValueError(
                    "ModelCheckpoint(train_time_interval=...): Lightning ignores it where a module steps its optimiser "
                    "itself, as this one does; give every_n_train_steps"
                )
        self._require_own_tables()
        self._target_tables = (self.target_tables.to(self.device),)
        if stage == "fit":
            self.steps_in_all = self.max_steps or self._steps_of_the_trainer()
            self.warmup = self.warmup_steps or max(1, round(self.warmup_share * self.steps_in_all))

    def _require_own_tables(self) -> None:
        """Refuse a precision that converts the module, frozen tables included, where these are a live target's too."""
        shared = bool(self.draft.target_tables) or "target" in (self.tables_from or {})
        precision, dtype = str(self.trainer.precision), self.draft.tables.embedding.dtype
        wanted = {"64-true": torch.float64, "bf16-true": torch.bfloat16, "32-true": torch.float32}.get(precision)
        if shared and wanted in (torch.float64, torch.bfloat16) and wanted != dtype:
            raise ValueError(
                f"precision={precision} would convert the tables that the draft shares with its target from {dtype}: "
                f"load the target in {wanted}, or use bf16-mixed or 32-true"
            )

    def _steps_of_the_trainer(self) -> int:
        """Length of the learning-rate schedule where `max_steps` leaves it to the trainer."""
        trainer = self.trainer
        if trainer.max_steps > 0:
            return trainer.max_steps
        by_epoch = getattr(trainer.datamodule, "steps_per_epoch", None)
        if trainer.max_epochs and trainer.max_epochs > 0 and by_epoch:
            return trainer.max_epochs * by_epoch
        raise ValueError(
            f"max_steps={trainer.max_steps} and max_epochs={trainer.max_epochs} of the Trainer do not say how long the "
            "learning-rate schedule is: give Trainer(max_steps=N) or DraftTraining(..., max_steps=N)"
        )

    def configure_optimizers(self) -> Any:
        rate, layers = self.recipe["lr"], self.draft.parameter_groups()
        groups = [{"params": ps, "lr": rate * self.layer_decay**away} for away, ps in enumerate(layers) if ps]
        if self.layer_decay == 1.0:
            groups = [p for p in self.draft.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(groups, **self.recipe)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.rate(step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def rate(self, step: int) -> float:
        """Factor of the learning rate at an optimiser step."""
        if self.decay is None:
            return warmup_cosine(step, self.steps_in_all, self.warmup)
        return warmup_constant(step, self.steps_in_all, self.warmup, self.decay)

    def share_on_policy(self, step: int) -> float:
        """Probability of a drawn token at an optimiser step."""
        ramp = self.on_policy_ramp * self.steps_in_all
        return self.on_policy * (min(1.0, step / ramp) if ramp else 1.0)

    def loss(self, draft: Draft, batch: Batch, epoch: int, on_policy: float = 0.0) -> Loss:
        """Loss sums of one micro-batch; its anchors depend on the anchor seed, the epoch and each conversation, and so
        do the tokens that are drawn in place of the text's with probability `on_policy`."""
        batch = with_anchors(batch, draft.anchors_per_sample, (self.anchor_seed, epoch), draft.supervision)
        batch = batch.to(self.device, self.target_tables.embedding.dtype)
        positions = batch.tokens.numel()
        if on_policy:
            policy = OnPolicy.of(batch, draft.block_size, on_policy, self.on_policy_temperature)
            blocks = policy.forward(draft, batch)
        else:
            blocks = draft(batch)
        return self.objective(draft, self.target_tables, blocks, positions=positions, progress=self.progress)

    def training_step(self, step: TrainingStep, index: int) -> None:
        with self.data_wait.step():
            self._optimise(step)
        if (step.number + 1) % self.log_every == 0:
            self.log("train/data_wait_share", self.data_wait.since_last())

    def _optimise(self, step: TrainingStep) -> None:
        began = time.perf_counter()
        optimizer, total = self.optimizers(), torch.zeros((), dtype=torch.float64, device=self.device)
        value, supervised = torch.zeros_like(total), torch.zeros_like(total)
        self.progress = step.number / self.steps_in_all
        optimizer.zero_grad()
        for batch in self.data_wait.over(step.micro):
            loss = self.loss(self.draft, batch, step.epoch, self.share_on_policy(step.number))
            # Not manual_backward: gradients are summed over ranks once, below, after all micro-batches.
            loss.value.backward()
            total += loss.weight.double()
            value += loss.value.detach().double()
            supervised += loss.slots.count.sum()
            self.train_slots.update(loss.slots)
        self._reduce(total, value, supervised)
        self.supervised += int(supervised)
        if total == 0:
            raise ValueError(
                f"optimiser step {step.number} holds no supervised slot; the conversations are too short for a block, "
                "or their loss masks are empty"
            )
        parameters = [p for p in self.draft.parameters() if p.grad is not None]
        for parameter in parameters:
            _local(parameter.grad).div_(total.to(parameter.grad.dtype))
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.gradient_clip or torch.inf)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        mean = value / total
        if not torch.isfinite(mean + norm):
            raise ValueError(
                f"the loss is {float(mean)} and the gradient's norm {float(norm)} at step {step.number}, and no weight "
                "was changed by it: lower trainer.recipe.lr, or check the cache"
            )
        optimizer.step()
        self.lr_schedulers().step()
        if self.average is not None:
            with torch.no_grad():
                pairs = zip(self.average.parameters(), self.draft.parameters(), strict=True)
                for mean_weight, weight in pairs:
                    _local(mean_weight).lerp_(_local(weight), 1 - self.ema)
        # The check of the loss above waited for the device; the optimiser's work is in the next step's time.
        self.seconds += time.perf_counter() - began
        # The progress bar and the loggers read numbers every `log_every` steps; each read costs a synchronisation.
        if (step.number + 1) % self.log_every == 0:
            rate = optimizer.param_groups[0]["lr"]
            self.log_dict({"train/loss": mean.float(), "train/gradient_norm": norm, "train/lr": rate}, prog_bar=False)
            self.log_dict({f"train/{k}": v for k, v in self.train_slots.compute().items()})
            self.log("loss", mean.float(), prog_bar=True, logger=False)
            self.train_slots.reset()

    def _reduce(self, *sums: Tensor) -> None:
        """Add up these numbers over ranks, in place, and the gradients unless sharding did so already."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return
        scalars = torch.stack(sums)
        dist.all_reduce(scalars)
        for one, everywhere in zip(sums, scalars, strict=True):
            one.copy_(everywhere)
        if self.sharded:
            return
        for parameter in self.draft.parameters():
            if parameter.requires_grad and parameter.grad is None:
                # A rank without a supervised slot also takes part in the sum.
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in self.draft.parameters() if p.requires_grad]
        flat = torch._utils._flatten_dense_tensors(gradients)
        dist.all_reduce(flat)
        for gradient, part in zip(gradients, torch._utils._unflatten_dense_tensors(flat, gradients), strict=True):
            gradient.copy_(part)

    def validation_step(self, step: TrainingStep, index: int) -> None:
        self.progress = 1.0
        with ordinary():
            for batch in step.micro:
                self.val_slots.update(self.loss(self.published, batch, 0).slots)
        if self.sharded:
            self.published.reshard()

    def on_validation_epoch_end(self) -> None:
        self._log_slots("val")

    def test_step(self, step: TrainingStep, index: int) -> None:
        """Same as validation, with other names: teacher-forced, on the held-out conversations."""
        self.validation_step(step, index)

    def on_test_epoch_end(self) -> None:
        self._log_slots("test")

    def _log_slots(self, name: str) -> None:
        with ordinary():
            self.log_dict({f"{name}/{k}": v for k, v in self.val_slots.compute().items()})
            self.val_slots.reset()

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The draft alone: metrics are transient and the tables belong to the cache."""
        full = super().state_dict(*args, **kwargs)
        return {k: v for k, v in full.items() if not k.startswith(("train_slots.", "val_slots."))}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["supervised"], checkpoint["seconds"] = self.supervised, self.seconds
        if self.draft.draft_vocabulary is not None:
            checkpoint["draft_vocabulary"] = self.draft.draft_vocabulary.cpu()
        if self.tables_from is None:
            tables = self.target_tables
            checkpoint["target_tables"] = {name: getattr(tables, name) for name in TABLES}

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        self.supervised = checkpoint["supervised"]
        self.seconds = checkpoint.get("seconds", 0.0)  # checkpoints of earlier versions lack it

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: str | Path,
        *,
        target: Target | None = None,
        target_tables: Tables | None = None,
        methods: Sequence[type[Draft]] = (),
    ) -> DraftTraining:
        """Load the module of a checkpoint, on the CPU. Only tensors and plain containers are unpickled.

        Args:
            checkpoint_path: a checkpoint of a script or of the command line.
            target: the target whose tables are used. None: `target_tables`, else the tables in the checkpoint, else
                those at the place that it names.
            target_tables: embedding and head of the target.
            methods: classes of methods outside of this package that the checkpoint can name.

        Returns:
            The module, with its draft and loss built from the stored settings.

        Raises:
            ValueError: the file is not such a checkpoint, or the tables are missing or do not fit.
        """
        found = read_checkpoint(checkpoint_path)
        try:
            kept = found["hyper_parameters"]
            named, training = kept["draft"], dict(kept["training"])
            facts, loss = named["backbone"], kept["objective"]
        except KeyError as error:
            raise ValueError(
                f"{checkpoint_path} does not say how its draft was built (no {error}): it is of an earlier version; "
                "load the draft/ folder of its run"
            ) from error
        kind = method_named(named["class"], methods)
        settings = checked(kind, named["settings"], "settings")
        backbone = Backbone(**checked(Backbone, facts, "backbone"))
        objective = Objective(**checked(Objective, loss, "objective"))
        tables = target.tables if target is not None else target_tables
        if tables is None:
            tables = _tables_again(found, training.get("tables_from"), str(checkpoint_path))
        wanted, given = (backbone.vocab_size, backbone.hidden_size), tuple(tables.embedding.shape)
        if wanted != given:
            raise ValueError(f"{checkpoint_path} was trained for a target with an embedding of {wanted}, not {given}")
        draft = kind(backbone, tables, draft_vocabulary=found.get("draft_vocabulary"), **settings)
        training = checked(cls, training, "training", ("draft", "objective", "target_tables"))
        module = cls(draft, objective, target_tables=tables, **training)
        missing, unknown = module.load_state_dict(found["state_dict"], strict=False)
        missing = [name for name in missing if not name.startswith(("train_slots.", "val_slots."))]
        if missing or unknown:
            raise ValueError(f"{checkpoint_path} lacks {missing} and has unknown tensors {unknown}: it is damaged")
        module.supervised = found["supervised"]
        return module


def _tables_of(draft: Draft) -> Tables:
    """The target's whole tables, from a draft that has them."""
    if draft.target_tables:
        return draft.target_tables[0]
    if draft.tables.trainable or draft.tables.ids is not None:
        raise ValueError(
            "this draft has tables of its own (train_tables or a reduced vocabulary), so the target's are not among "
            "them: give target_tables=target.tables"
        )
    return draft.tables


def _tables_again(checkpoint: Mapping[str, Any], place: Mapping[str, Any] | None, name: str) -> Tables:
    """The tables in a checkpoint, or those at the place that it names."""
    if "target_tables" in checkpoint:
        return Tables(**checkpoint["target_tables"])
    place = place or {}
    try:
        if place.get("cache"):
            return TargetCache(place["cache"], taps=[]).tables
        if place.get("target"):
            return Target.load(place["target"], [], place.get("revision")).tables
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{name}: its target's tables are not to be had from {dict(place)} ({error}): give target="
        ) from error
    raise ValueError(f"{name} holds no tables of its target and does not say where they are: give target=")


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, the tensor itself otherwise."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def trainable_parameters(draft: Draft) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in draft.parameters() if p.requires_grad)


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A digest of named tensors, with which records identify a checkpoint."""
    import xxhash

    state = xxhash.xxh3_128()
    for key, value in sorted(tensors, key=lambda pair: pair[0]):
        state.update(key.encode())
        state.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()
