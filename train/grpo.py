"""TRL's GRPOTrainer with shared prompts: rollouts prefill a prompt once per group, updates encode it once per group.

Only the methods through which TRL's log-probabilities, completions and checkpoints pass are replaced, and the rollouts
are recorded on their way. Sampling noise is a function of the seed and the step (or the step's completion), so arms
share it and a resumed run draws what the uninterrupted one would have drawn. Before it is used, sharing is compared
with TRL's own path; where it does not hold, TRL's own path is taken, and that is said. RLOO (train/rloo.py) and PPO
(train/ppo.py) replace assign_credit and the loss.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import DistributedType, gather_object
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from trl import GRPOConfig, GRPOTrainer
from trl.models import unwrap_model_for_generation

from models.checkpoints import SealedTrainer
from models.fused_lora import fuse_lora
from models.merged import can_merge, merged
from models.rollout import sample
from models.self_check import check_trees, difference, is_exact, raised, rollout_problem
from models.shared_prompt import (
    Tree,
    attention_masks,
    base_model,
    pack,
    pack_for_forward,
    packed_logps,
    structural_problem,
)
from train.batches import padded, tree_runs, whole_rows

Record = Callable[[int, list[dict[str, Any]], list[list[int]], list[list[int]], Tensor, Tensor], None]
Keep = Callable[[list[dict[str, Any]]], int]
Noise = Literal["step", "row"]
BLIND = (
    "TRL's own sampling gives no log-probabilities, so train.watch.sampling_gap sees nothing and cannot stop the arm"
)
ONE_COPY = (DistributedType.NO, DistributedType.MULTI_CPU)  # where every process holds the whole policy

log = logging.getLogger("traitdose")


class SharedPromptGRPOTrainer(SealedTrainer, GRPOTrainer):
    """GRPOTrainer whose groups share their prompt, in rollouts and updates.

    `keep(prompts)` says how many of a step's groups are still affordable (rounded down to a multiple of the processes x
    micro-batches that share the step, but for the first of these), and
    `record(step, inputs, prompt_ids, completion_ids, rewards (B, functions), advantages (B,))` is called after every
    rollout batch. With several processes, both see the whole step in every process, and must do the same in each.
    `save(folder)` adds the caller's files to a checkpoint, in the main process; `fall_back(reason)` is called once if
    prompts cannot be shared. `noise` is drawn once per step, or for every completion apart ("row"; always with several
    processes, because then the rollouts do not depend on their number). `measure_kl` logs the KL to the starting model
    where no loss needs it; `canary` logs how far the log-probabilities of sampling and training are apart.
    """

    args: GRPOConfig
    model: Any
    num_generations: int

    def __init__(
        self,
        *args: Any,
        token_budget: int,
        record: Record,
        keep: Keep,
        share: bool = True,
        noise: Noise = "step",
        save: Callable[[Path], None] | None = None,
        fall_back: Callable[[str], None] | None = None,
        measure_kl: bool = False,
        canary: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.use_transformers_continuous_batching and (self.args.bf16 or self.args.fp16):
            raise ValueError(
                "train: TRL's continuous batching casts the policy's fp32 weights to half precision for good, so that "
                "small updates vanish; sample with vLLM, with shared prompts, or without bf16 and fp16"
            )
        self.token_budget = token_budget
        self.record = record
        self.keep = keep
        self.share = share
        self.parts = self.args.steps_per_generation or 1  # in which a batch of rollouts is trained
        self.noise = noise if self.accelerator.num_processes == 1 else "row"
        self.save = save
        self.fall_back = fall_back
        self.measure_kl = measure_kl
        self.canary = canary
        self.checked = False
        self._read_B: Tensor | None = None  # the rows that the update at hand reads; None outside of updates
        whole = self.accelerator.unwrap_model(self.model)
        if share:
            fuse_lora(whole)
        self._merges = share and self.accelerator.distributed_type in ONE_COPY and can_merge(whole)
        self._merged: Any = None  # the policy with its adapter added, which decodes
        if share and self._entropy_bonus_enabled:
            raise ValueError("train: an entropy bonus needs entropy gradients, which prompt sharing does not compute")

    # -- log-probabilities

    def _get_per_token_logps_and_entropies(  # type: ignore[override]
        self,
        model: Any,
        input_ids: Tensor,  # (B, P + C) left-padded prompts, right-padded completions
        attention_mask: Tensor,  # (B, P + C)
        logits_to_keep: int,  # C
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **multimodal: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probabilities and entropies of the completions, (B, C), zero where the mask is zero."""
        if not self.share or compute_aux_loss or any(value is not None for value in multimodal.values()):
            stock = super()._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size,
                compute_entropy,
                compute_aux_loss,
                **multimodal,
            )
            self._latest_logps = stock[0].detach()
            return stock
        logps_BC, entropies_BC = self._shared_logps(model, input_ids, attention_mask, logits_to_keep, self._read_B)
        self._latest_logps = logps_BC.detach()
        return logps_BC, entropies_BC if compute_entropy else None, None

    def _shared_logps(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, read_B: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, C) each. Rows that are not read have log-probability zero, and the mean entropy of those that are."""
        width = input_ids.shape[1] - logits_to_keep
        runs = tree_runs(input_ids, attention_mask, width, self.token_budget, read_B)
        logps_BC = torch.zeros(input_ids.shape[0], logits_to_keep, device=input_ids.device)
        entropies_BC = torch.zeros_like(logps_BC)
        for trees, row_N, col_N in runs:
            with self.accelerator.autocast():
                logps_N, entropies_N = self._packed_logps(model, trees)
            logps_BC = logps_BC.index_put((row_N, col_N), logps_N)
            entropies_BC[row_N, col_N] = entropies_N
        if read_B is not None:
            tokens = sum(len(row_N) for _, row_N, _ in runs)
            entropies_BC[~read_B] = entropies_BC[read_B].sum() / max(tokens, 1)
        if self.accelerator.num_processes > 1:
            # Wrapped models communicate in every forward and backward pass, so all processes make equally many.
            most = int(self.gathered(torch.tensor([len(runs)], device=input_ids.device)).max())
            prompt = runs[0][0][0].prompt
            for _ in range(most - len(runs)):
                with self.accelerator.autocast():
                    idle_N, _ = self._packed_logps(model, [Tree(prompt, [prompt[-1:]])])
                logps_BC = logps_BC + 0.0 * idle_N.sum()
        return logps_BC, entropies_BC

    def _packed_logps(self, model: Any, trees: list[Tree]) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies of the trees' branch tokens, each (N,)."""
        device = self.accelerator.device
        if self.accelerator.distributed_type == DistributedType.NO:
            return packed_logps(model, pack(trees, device), self.temperature)
        # DDP, FSDP and DeepSpeed act in the forward of the wrapped model, which TRL has given a fused LM head.
        packed, labels_T = pack_for_forward(trees, device)
        inner = base_model(self.accelerator.unwrap_model(model))
        outputs = model(
            input_ids=packed.input_ids,
            position_ids=packed.position_ids,
            attention_mask=attention_masks(packed, inner.get_decoder().config, inner.dtype),
            shift_labels=labels_T,
            fused_lm_head=True,
        )
        logps_T, entropies_T = outputs.log_probs[0], outputs.entropy
        entropies_T = torch.zeros_like(logps_T) if entropies_T is None else entropies_T[0]  # the reference has none
        return logps_T[packed.predictors], entropies_T[packed.predictors].detach()

    # -- rollouts

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], images: Any, multimodal_fields: Any, num_generations: int, **kwargs: Any
    ) -> tuple[list[list[int]], Any]:
        """Completions of the prompts, which arrive repeated num_generations times in a row."""
        stock = not self.share or self.use_vllm or self.use_transformers_continuous_batching or images is not None
        if stock or not plain_sampling(self.generation_config):
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields, num_generations, **kwargs)
        logps: list[list[list[float]]] | None = [] if self.canary else None
        with self._decoding_model() as model:
            groups = sample(
                model,
                prompt_ids[::num_generations],
                group_size=num_generations,
                max_new_tokens=self.args.max_completion_length or 256,
                temperature=self.temperature,
                eos_ids=self.eos_token_ids,
                generator=self._generator(len(prompt_ids)),
                batch_size=len(prompt_ids),
                logps=logps,
            )
        flat = None if logps is None else [row for group in logps for row in group]
        return [completion for group in groups for completion in group], flat

    @contextmanager
    def _decoding_model(self) -> Iterator[Any]:
        """The policy in eval mode, whole in this process: processes decode different numbers of tokens."""
        with unwrap_model_for_generation(self.model_wrapped, self.accelerator) as model:
            shards = [part for part in model.modules() if isinstance(part, FSDPModule)]
            for part in shards:
                part.set_reshard_after_forward(False, recurse=False)
                part.unshard()
            was_training = model.training
            model.eval()
            if self._merges:
                self._merged = merged(model, into=self._merged)
            yield self._merged if self._merges else model
            model.train(was_training)
            for part in shards:
                part.reshard()
                part.set_reshard_after_forward(part is not model, recurse=False)

    def _generator(self, rows: int) -> torch.Generator | list[torch.Generator]:
        """Noise of this step's rollouts: one stream, or one for each of this process's rows."""
        seed, step, device = self.args.seed, self.state.global_step, self.accelerator.device
        if self.noise == "step":
            return torch.Generator(device).manual_seed(step_seed(seed, step, 0))
        first = self.accelerator.process_index * rows
        return [torch.Generator(device).manual_seed(step_seed(seed, step, first + row)) for row in range(rows)]

    # -- a step's batch

    def _generate(self, prompts: list) -> Any:
        generated = super()._generate(prompts)
        self._prompt_ids, self._completion_ids = generated[0], generated[1]
        return generated

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        """Scores of all processes, (B, functions); a row without a paying score is NaN throughout.

        TRL leaves such a row out of its group's baseline, but would count it as 0 because its monitors have a value.
        """
        self._rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._paid = total_rewards(self._rewards, self.reward_weights)
        return self._rewards.masked_fill(self._paid.isnan()[:, None], torch.nan)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.checked:
            self._check_sharing()
        inputs = self._affordable(inputs)
        output = super()._generate_and_score_completions(inputs)
        if self.measure_kl and "ref_per_token_logps" not in output:
            with self.accelerator.unwrap_model(self.model).disable_adapter():
                output["ref_per_token_logps"] = self.batch_logps(output)
        advantages = self.assign_credit(output)
        # Processes hold consecutive slices of the step; what is gathered is the step in the order of its prompts.
        self.record(
            self.state.global_step,
            gather_object(inputs),
            gather_object(self._prompt_ids),
            gather_object(self._completion_ids),
            self._rewards,
            self.gathered(advantages),
        )
        return output

    def assign_credit(self, output: dict[str, Any]) -> Tensor:
        """Set output["advantages"] for the loss; returns one advantage per completion, (B,), for the record."""
        return output["advantages"]

    @torch.no_grad()
    def batch_logps(self, batch: dict[str, Any]) -> Tensor:
        """Log-probabilities of a batch's completions under the policy as it is, (B, C). No gradient."""
        rows = self.args.per_device_train_batch_size  # of one forward, where prompts are not shared
        ids, mask = whole_rows(batch)
        return self._get_per_token_logps_and_entropies(self.model, ids, mask, batch["completion_ids"].shape[1], rows)[0]

    def _affordable(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """This process's share of the groups that the budget still pays for, the same number in every process."""
        whole: list[dict[str, Any]] = gather_object(inputs)
        groups = whole[:: self.num_generations]
        parts = self.accelerator.num_processes * self.parts
        kept = max(self.keep(groups) // parts, 1) * parts
        share = kept * self.num_generations // self.accelerator.num_processes
        first = self.accelerator.process_index * share
        return whole[first : first + share]

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """TRL's, but without its shuffle where a batch is trained in parts: a group stays in one part."""
        if not self.model.training or self.parts == 1:
            return super()._prepare_inputs(generation_batch)
        if self._step % (self.parts * self.num_iterations) == 0 or self._buffered_inputs is None:
            batch = self._generate_and_score_completions(generation_batch)
            rows = len(batch["advantages"]) // self.parts
            self._buffered_inputs = [
                {key: value[i * rows : (i + 1) * rows] if value.dim() else value for key, value in batch.items()}
                for i in range(self.parts)
            ]
        return self._buffered_inputs[self._step % self.parts]

    # -- the update

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The gradient's norm, as it is logged; where it is not finite, the step that follows changes nothing."""
        norm = super()._get_grad_norm(model, grad_norm)
        drop_broken(norm, model.parameters())
        return norm

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, *args: Any, **kwargs: Any) -> None:
        super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)
        if not torch.isfinite(tr_loss):
            tr_loss.zero_()  # the running loss: less itself, NaN stays NaN in every later step

    # -- the loss, and what is logged beside it

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        with self.reading(inputs) as batch:
            loss = super()._compute_loss(model, batch)
            self.log_gaps(batch, self._latest_logps)
        return loss

    @contextmanager
    def reading(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Within it the policy reads only rows that the loss depends on: not those without an advantage.

        Such a row's loss and gradient are zero whatever its log-probabilities; it still counts in every mean that the
        loss takes. In easy tasks most groups are of this kind, all right or all wrong. One row at least is read, for
        the gradients that the optimizer and other processes expect. Entropy and canary are then of the rows read.
        """
        advantages = batch["advantages"]
        every = not self.share or advantages.dim() > 1 or self.beta != 0.0 or "ref_per_token_logps" in batch
        if every or bool((advantages != 0).all()):
            yield batch
            return
        read_B = advantages != 0
        read_B[0] |= ~read_B.any()
        if "old_per_token_logps" in batch:  # so that the ratio of what is not read is one
            batch = batch | {"old_per_token_logps": batch["old_per_token_logps"] * read_B[:, None]}
        self._read_B = read_B
        try:
            yield batch
        finally:
            self._read_B = None

    def log_gaps(self, batch: dict[str, Any], logps_BC: Tensor) -> None:
        """Log the canary, and the KL to the start where TRL's loss has no KL term (Schulman's k3, mean per token)."""
        mask_BC = batch["completion_mask"]
        if self._read_B is not None:
            mask_BC = mask_BC * self._read_B[:, None]
        if "sampling_per_token_logps" in batch and not self.use_vllm:  # with vLLM TRL logs it
            gap_BC = (batch["sampling_per_token_logps"] - logps_BC).abs()
            self.log_mean("sampling/sampling_logp_difference/mean", gap_BC, mask_BC)
        if "ref_per_token_logps" in batch and self.beta == 0.0:
            log_ratio_BC = batch["ref_per_token_logps"] - logps_BC
            self.log_mean("kl", log_ratio_BC.exp() - log_ratio_BC - 1, mask_BC)

    def log_mean(self, name: str, values: Tensor, mask: Tensor) -> None:
        """Log the mean of the unmasked values over all processes."""
        sums = torch.stack([values.masked_fill(mask == 0, 0.0).sum(), mask.sum().float()])
        total, count = self.reduced(sums, "sum").tolist()
        self._metrics["train" if self.model.training else "eval"][name].append(total / max(count, 1.0))

    def gathered(self, values: Tensor) -> Tensor:
        """The values of all processes one after the other, (N,) -> (processes x N,)."""
        every: Any = self.accelerator.gather(values)
        return every

    def reduced(self, values: Tensor, how: Literal["sum", "mean"]) -> Tensor:
        """The sum or mean of the values over all processes, of the same shape."""
        result: Any = self.accelerator.reduce(values, reduction=how)
        return result

    @contextmanager
    def kl_in_reward(self) -> Iterator[None]:
        """Within it TRL's loss has no KL term: the rewards hold the penalty."""
        beta, self.beta = self.beta, 0.0
        try:
            yield
        finally:
            self.beta = beta

    # -- self-check

    @property
    def _blind(self) -> bool:
        """Whether the canary would see nothing without shared prompts: transformers' generation gives no logprobs."""
        return self.canary and not self.use_vllm

    def _check_sharing(self) -> None:
        """Compare the shared paths with the plain ones, once; on a difference take TRL's own from now on."""
        self.checked = True
        problem = self._sharing_problem() if self.share else None
        if problem is None:
            if not self.share and self._blind and self.accelerator.is_main_process:
                log.warning("prompts are not shared: %s", BLIND)
            return
        self.share = False
        if self._blind:
            problem = f"{problem} ({BLIND})"
        name = base_model(self.accelerator.unwrap_model(self.model)).config.name_or_path or "the policy"
        if self.accelerator.is_main_process:
            log.warning(
                "prompt sharing is off for %s: %s. TRL's own path is taken, several times slower; the ledger counts "
                "its cost and names this reason",
                name,
                problem,
            )
        if self.fall_back is not None:
            self.fall_back(problem)

    @torch.no_grad()
    def _sharing_problem(self) -> str | None:
        model = self.accelerator.unwrap_model(self.model)
        problem = structural_problem(base_model(model).get_decoder())
        if problem is not None:
            return problem
        plugin = self.accelerator.state.deepspeed_plugin
        if plugin is not None and plugin.zero_stage == 3:
            return "DeepSpeed ZeRO-3 gathers the weights for a model's own forward only"
        exact = is_exact(model) and self.accelerator.mixed_precision == "no"
        trees = check_trees(base_model(model).config.get_text_config().vocab_size)
        pad: Any = self._tokenizer.pad_token_id
        input_ids, attention_mask, width = padded(trees, pad, self.accelerator.device)
        kept = attention_mask[:, width:].bool()
        was_training = self.model.training
        self.model.eval()
        try:
            plain, _, _ = super()._get_per_token_logps_and_entropies(
                self.model, input_ids, attention_mask, kept.shape[1]
            )
            ours, _ = self._shared_logps(self.model, input_ids, attention_mask, kept.shape[1])
            problem = difference(ours[kept], plain[kept], exact)
        except Exception as error:  # a model's own code may fail in any way on a layout that it was not written for
            return raised("the shared forward", error)
        finally:
            self.model.train(was_training)
        if problem is None and not self.use_vllm:
            with self._decoding_model() as decoder:
                problem = rollout_problem(decoder, exact)
        return problem

    # -- checkpoints

    def save_extras(self, folder: Path) -> None:
        """Add what TRL leaves out; a subclass with a state of its own extends it.

        TRL counts batches and keeps rollouts for several of them, and starts both anew when it resumes.
        """
        within = self._step % (self.parts * self.num_iterations) != 0
        state = {"step": self._step, "buffered": self._buffered_inputs if within else None}
        torch.save(state, folder / self._extras())
        if self.args.should_save and self.save is not None:
            self.save(folder)

    def load_extras(self, folder: Path) -> None:
        """Take back what save_extras wrote in this process, if it was one of as many."""
        path = folder / self._extras()
        if path.exists():
            state = torch.load(path, map_location=self.args.device, weights_only=True)
            self._step, self._buffered_inputs = state["step"], state["buffered"]

    def _extras(self) -> str:
        return f"batch-{self.accelerator.process_index}-of-{self.accelerator.num_processes}.pt"


def total_rewards(rewards_BF: Tensor, weights_F: Tensor) -> Tensor:
    """Weighted sum of the reward functions' scores, (B,); NaN where no function with a weight has scored the row."""
    weights_F = weights_F.to(rewards_BF.device)
    paid_B = (~rewards_BF.isnan() & (weights_F != 0)).any(1)
    return (rewards_BF * weights_F).nansum(1).masked_fill(~paid_B, torch.nan)


def drop_broken(norm: Any, parameters: Iterable[torch.nn.Parameter]) -> None:
    """Forget gradients whose norm is NaN or infinite: an optimizer leaves what has no gradient as it is.

    One such update would make every weight NaN. The step is still counted, and train.watch.non_finite sees its norm.
    DeepSpeed has taken its update by then, and gives no norm before its first.
    """
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()  # a process may hold its own part of it
    if norm is None or math.isfinite(float(norm)):
        return
    for parameter in parameters:
        parameter.grad = None


def plain_sampling(config: Any) -> bool:
    """Whether a generation config samples the whole vocabulary at a temperature, and nothing else."""
    whole = config.top_k in (None, 0) and config.top_p in (None, 1.0) and config.min_p in (None, 0.0)
    return bool(config.do_sample) and whole and config.repetition_penalty in (None, 1.0)


def step_seed(seed: int, step: int, row: int) -> int:
    """A seed for one step's sampling noise, or one of its rows', (0, 2^63)."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{row}".encode()).digest()[:8], "big") >> 1
