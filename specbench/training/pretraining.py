"""Pretraining of a small causal language model on the embedded corpus, by Lightning.

The network is passed in (token ids -> logits, or an output with `.logits`); this module only trains it.
Conversations are batched by length: every conversation starts at position 0 of its own row and no row sees another.

Axes: B conversations of a batch, T tokens of the longest one, V vocabulary.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence

import lightning
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import MeanMetric

from specbench.data.loading.padded_rows import CorpusText, PaddedRows, batches
from specbench.data.prompts.embedded_corpus import DOMAINS, conversations
from specbench.ranges import AboveZero, AtLeastZero, Count, LearningRate, Natural, Seconds, Seed, Share, Tokens


def token_losses(logits: Float[Tensor, "B T V"], tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T-1"]:
    """Cross-entropy of every next token, in nats."""
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(
        len(tokens), -1
    )


class _Passes(IterableDataset):
    """Endless passes over the examples; pass number p is shuffled by (seed, p)."""

    def __init__(self, examples: Sequence[CorpusText], tokens: int, prompt_weight: float, seed: int) -> None:
        self.examples, self.tokens, self.prompt_weight, self.seed = examples, tokens, prompt_weight, seed

    def __iter__(self) -> Iterator[PaddedRows]:
        number = 0
        while True:
            yield from batches(self.examples, self.tokens, self.prompt_weight, random.Random(f"{self.seed}/{number}"))
            number += 1


class CorpusBatches(lightning.LightningDataModule):
    """Training and validation conversations of the corpus as token rows.

    `repeats` says how often a domain occurs in one pass (0 leaves it out), `limit` limits the conversations of a
    domain, `validation` is how many of each are held out for the loss, `length` is the longest conversation in tokens:
    longer ones are left out and counted in `left_out`. The tokenizer's template marks the assistant's tokens; the
    prompt's tokens have the weight `prompt_weight` in the loss.
    """

    def __init__(
        self,
        tokenizer,
        batch_tokens: Tokens = 2048,
        prompt_weight: Share = 0.1,
        repeats: dict[str, Natural] | None = None,
        limit: Count | None = None,
        validation: Count = 100,
        length: Tokens = 1024,
        seed: Seed = 0,
    ) -> None:
        super().__init__()
        self.tokenizer, self.batch_tokens, self.prompt_weight = tokenizer, batch_tokens, prompt_weight
        self.repeats = {d: 1 for d in DOMAINS} | (repeats or {})
        self.limit, self.validation, self.length, self.seed = limit, validation, length, seed
        self.left_out = 0
        self.examples: dict[str, list[CorpusText]] = {}

    def setup(self, stage: str) -> None:
        if self.examples:
            return
        train = [e for d in DOMAINS for e in self._encode(d, "train", self.limit) * self.repeats[d]]
        held_out = [e for d in DOMAINS for e in self._encode(d, "validation", self.validation)]
        self.examples = {"train": train, "validation": held_out}

    def _encode(self, domain: str, split: str, count: int | None) -> list[CorpusText]:
        if not self.repeats[domain]:
            return []
        chosen = [c["messages"] for c in conversations(domain, split, count, self.seed)]
        if not chosen:
            return []
        encoded = self.tokenizer.apply_chat_template(
            chosen, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
        fitting = [CorpusText(t, m, DOMAINS.index(domain)) for t, m in pairs if len(t) <= self.length]
        self.left_out += len(chosen) - len(fitting)
        return fitting

    def train_dataloader(self) -> DataLoader:
        rows = _Passes(self.examples["train"], self.batch_tokens, self.prompt_weight, self.seed)
        return DataLoader(rows, batch_size=None)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(list(batches(self.examples["validation"], 8192, 0.0, None)), batch_size=None)


class LanguageModeling(lightning.LightningModule):
    """Next-token training: Muon for the matrices of the layers, AdamW for embeddings, norms and head.

    The learning rate warms up linearly over `warmup` steps and follows a cosine down to a hundredth. Its progress is
    the larger of steps / `steps` and seconds / `seconds`, so a budget can be steps, elapsed time or both; training
    stops when the budget is used. `val/loss/DOMAIN` is in nats per token, over the assistant's tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        steps: Count | None = None,
        seconds: Seconds | None = None,
        matrix_rate: LearningRate = 5e-3,
        vector_rate: LearningRate = 4e-3,
        weight_decay: AtLeastZero = 0.01,
        warmup: Natural = 50,
        clip: AboveZero = 1.0,
    ) -> None:
        super().__init__()
        if steps is None and seconds is None:
            raise ValueError("a pretraining budget needs steps or seconds: set at least one of them")
        self.automatic_optimization = False
        self.model = model
        self.steps, self.seconds, self.warmup, self.clip = steps, seconds, warmup, clip
        self.matrix_rate, self.vector_rate, self.weight_decay = matrix_rate, vector_rate, weight_decay
        self.losses = nn.ModuleDict({d: MeanMetric() for d in DOMAINS})
        self.spent = 0.0
        self.tokens_seen = 0
        self._resumed = time.monotonic()

    def forward(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        out = self.model(tokens)
        return out if isinstance(out, Tensor) else out.logits

    def progress(self) -> float:
        """Share of the budget that is spent, 1 at its end."""
        by_steps = self.global_step / self.steps if self.steps else 0.0
        by_clock = self.elapsed() / self.seconds if self.seconds else 0.0
        return min(1.0, max(by_steps, by_clock))

    def elapsed(self) -> float:
        """Seconds of training, those before a resumed checkpoint included."""
        return self.spent + time.monotonic() - self._resumed

    def rate(self) -> float:
        """Factor on the learning rates at this step."""
        cosine = 0.5 + 0.5 * math.cos(math.pi * self.progress())
        return min(1.0, (self.global_step + 1) / self.warmup) * max(0.01, cosine)

    def training_step(self, rows: PaddedRows, index: int) -> Tensor:
        weight = rows.weight[:, 1:]
        loss = (token_losses(self(rows.tokens), rows.tokens) * weight).sum() / weight.sum()
        counted, matrices = self.optimizers()[0], self.optimizers(use_pl_optimizer=False)[1]
        counted.zero_grad()
        matrices.zero_grad()
        self.manual_backward(loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        factor = self.rate()
        for optimizer, rate in ((counted, self.vector_rate), (matrices, self.matrix_rate)):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        # Lightning counts a step for every optimiser it wraps: only one of the two is stepped through its wrapper.
        matrices.step()
        counted.step()
        self.tokens_seen += int((rows.weight > 0).sum())
        self.log("train/loss", loss.detach(), prog_bar=True)
        self.log("train/rate", factor)
        self.trainer.should_stop = self.trainer.should_stop or self.progress() >= 1.0
        return loss.detach()

    def validation_step(self, rows: PaddedRows, index: int) -> None:
        losses, counted = token_losses(self(rows.tokens), rows.tokens), rows.weight[:, 1:] > 0
        for number, domain in enumerate(DOMAINS):
            chosen = counted & (rows.domain == number)[:, None]
            if chosen.any():
                self.losses[domain].update(losses[chosen])

    def on_validation_epoch_end(self) -> None:
        for domain, metric in self.losses.items():
            if metric.update_called:
                self.log(f"val/loss/{domain}", metric.compute(), prog_bar=True)
                metric.reset()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        matrices, others = split_parameters(self.model)
        return [
            torch.optim.AdamW(others, lr=self.vector_rate, betas=(0.9, 0.95), weight_decay=0.0),
            torch.optim.Muon(
                matrices, lr=self.matrix_rate, weight_decay=self.weight_decay, adjust_lr_fn="match_rms_adamw"
            ),
        ]

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["budget"] = {"seconds": self.elapsed(), "tokens": self.tokens_seen}

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.spent, self.tokens_seen = checkpoint["budget"]["seconds"], checkpoint["budget"]["tokens"]
        self._resumed = time.monotonic()

    def on_train_start(self) -> None:
        self._resumed = time.monotonic()


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Weight matrices of linear layers that are not tied to an embedding, and everything else."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    vocabulary = {m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices = {
        id(m.weight): m.weight
        for m in model.modules()
        if isinstance(m, nn.Linear) and id(m.weight) not in embeddings and m.out_features not in vocabulary
    }
    return list(matrices.values()), [p for p in model.parameters() if id(p) not in matrices]


def initialise(model: nn.Module) -> nn.Module:
    """Small embeddings, matrices scaled by fan-in, and residual branches that start at zero, so that high rates are
    stable."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.zeros_(parameter)
        elif parameter.dim() == 2:
            embedding = "embed" in name or "lm_head" in name
            nn.init.normal_(parameter, std=0.02 if embedding else 0.6 * parameter.shape[1] ** -0.5)
    return model
