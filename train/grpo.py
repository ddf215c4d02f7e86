"""TRL's GRPOTrainer with shared prompts: rollouts prefill a prompt once per group, updates encode it once per group.

Only the methods through which TRL's log-probabilities, completions and checkpoints pass are replaced, and the rollouts
are recorded on their way. Sampling noise is a function of the seed and the step (or the step's completion), so arms
share it and a resumed run draws what the uninterrupted one would have drawn. Before it is used, sharing is compared
with TRL's own path; where it does not hold, TRL's own path is taken, and that is said.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import DistributedType, gather_object
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from trl import GRPOConfig, GRPOTrainer
from trl.models import unwrap_model_for_generation

from models.rollout import sample
from models.self_check import check_trees, difference, is_exact, raised, rollout_problem
from models.shared_prompt import (
    Tree,
    attention_masks,
    base_model,
    fill,
    pack,
    pack_for_forward,
    packed_logps,
    structural_problem,
)
from train.checkpoints import PARTIAL, clear_partial, partial_folder, seal

Record = Callable[[int, list[dict[str, Any]], list[list[int]], list[list[int]], Tensor, Tensor], None]
Keep = Callable[[list[dict[str, Any]]], int]
Noise = Literal["step", "row"]

log = logging.getLogger("traitdose")


class SharedPromptGRPOTrainer(GRPOTrainer):
    """GRPOTrainer whose groups share their prompt, in rollouts and updates.

    `keep(prompts)` says how many of a step's groups are still affordable, and
    `record(step, inputs, prompt_ids, completion_ids, rewards (B, functions), advantages (B,))` is called after every
    rollout batch. With several processes, both see the whole step in every process, and must do the same in each.
    `save(folder)` adds the caller's files to a checkpoint, in the main process; `fall_back(reason)` is called once if
    prompts cannot be shared. `noise` is drawn once per step, or for every completion apart ("row"; always with several
    processes, because then the rollouts do not depend on their number).
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
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.token_budget = token_budget
        self.record = record
        self.keep = keep
        self.share = share
        self.parts = self.args.steps_per_generation or 1  # in which a batch of rollouts is trained
        self.noise = noise if self.accelerator.num_processes == 1 else "row"
        self.save = save
        self.fall_back = fall_back
        self.checked = False
        self._sealing = False
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
            return super()._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size,
                compute_entropy,
                compute_aux_loss,
                **multimodal,
            )
        logps_BC, entropies_BC = self._shared_logps(model, input_ids, attention_mask, logits_to_keep)
        return logps_BC, entropies_BC if compute_entropy else None, None

    def _shared_logps(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int
    ) -> tuple[Tensor, Tensor]:
        trees, rows = group_rows(input_ids, attention_mask, input_ids.shape[1] - logits_to_keep)
        logps_BC = torch.zeros(input_ids.shape[0], logits_to_keep, device=input_ids.device)
        entropies_BC = torch.zeros_like(logps_BC)
        runs = list(fill([len(tree) for tree in trees], self.token_budget))
        for run in runs:
            with self.accelerator.autocast():
                logps_N, entropies_N = self._packed_logps(model, [trees[i] for i in run])
            branches = [(row, branch) for i in run for row, branch in zip(rows[i], trees[i].branches, strict=True)]
            places = [(row, c) for row, branch in branches for c in range(len(branch))]
            row_N, col_N = torch.tensor(places, dtype=torch.long, device=input_ids.device).view(-1, 2).unbind(1)
            logps_BC = logps_BC.index_put((row_N, col_N), logps_N)
            entropies_BC[row_N, col_N] = entropies_N
        if self.accelerator.num_processes > 1:
            # Wrapped models communicate in every forward and backward pass, so all processes make equally many.
            counts: Any = self.accelerator.gather(torch.tensor([len(runs)], device=input_ids.device))
            for _ in range(int(counts.max()) - len(runs)):
                with self.accelerator.autocast():
                    idle_N, _ = self._packed_logps(model, [Tree(trees[0].prompt, [trees[0].prompt[-1:]])])
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
            )
        return [completion for group in groups for completion in group], None

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
            yield model
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
        self._rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        return self._rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.checked:
            self._check_sharing()
        inputs = self._affordable(inputs)
        output = super()._generate_and_score_completions(inputs)
        # Processes hold consecutive slices of the step; what is gathered is the step in the order of its prompts.
        advantages: Any = self.accelerator.gather(output["advantages"])
        self.record(
            self.state.global_step,
            gather_object(inputs),
            gather_object(self._prompt_ids),
            gather_object(self._completion_ids),
            self._rewards,
            advantages,
        )
        return output

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

    # -- self-check

    def _check_sharing(self) -> None:
        """Compare the shared paths with the plain ones, once; on a difference take TRL's own from now on."""
        self.checked = True
        problem = self._sharing_problem() if self.share else None
        if problem is None:
            return
        self.share = False
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

    def _get_output_dir(self, trial: Any) -> str:
        folder = Path(super()._get_output_dir(trial))
        return str(folder / PARTIAL if self._sealing else folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial))
        partial = partial_folder(folder, self.state.global_step)
        if self.args.should_save:
            clear_partial(folder)
        self.accelerator.wait_for_everyone()
        self._sealing = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._sealing = False
        self.save_extras(partial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            seal(partial, folder, keep=self.args.save_total_limit or 2)
        self.accelerator.wait_for_everyone()

    def save_extras(self, folder: Path) -> None:
        """Add to a checkpoint, before it is sealed, what TRL leaves out; a subclass with a state of its own extends it.

        TRL counts batches and keeps rollouts for several of them, and starts both anew when it resumes.
        """
        within = self._step % (self.parts * self.num_iterations) != 0
        state = {"step": self._step, "buffered": self._buffered_inputs if within else None}
        torch.save(state, folder / self._extras())
        if self.args.should_save:
            (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
            if self.save is not None:
                self.save(folder)

    def load_extras(self, folder: Path) -> None:
        """Take back what save_extras wrote in this process, if it was one of as many."""
        path = folder / self._extras()
        if path.exists():
            state = torch.load(path, map_location=self.args.device, weights_only=True)
            self._step, self._buffered_inputs = state["step"], state["buffered"]

    def _extras(self) -> str:
        return f"batch-{self.accelerator.process_index}-of-{self.accelerator.num_processes}.pt"

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.args.device.type == "cpu":  # several processes on a CPU get "cpu:0", which torch.load does not know
            vars(self.args)["_setup_devices"] = torch.device("cpu")
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.load_extras(Path(checkpoint))


def plain_sampling(config: Any) -> bool:
    """Whether a generation config samples the whole vocabulary at a temperature, and nothing else."""
    whole = config.top_k in (None, 0) and config.top_p in (None, 1.0) and config.min_p in (None, 0.0)
    return bool(config.do_sample) and whole and config.repetition_penalty in (None, 1.0)


def group_rows(input_ids: Tensor, attention_mask: Tensor, width: int) -> tuple[list[Tree], list[list[int]]]:
    """Trees of a padded batch: rows with equal prompts share one, wherever TRL's shuffle has put them.

    `width` is the padded prompt width P. Returns the trees and, for each, the batch rows of its branches.
    """
    ids, mask = input_ids.tolist(), attention_mask.bool().tolist()
    rows_of: dict[tuple[int, ...], list[int]] = {}
    for row, (tokens, kept) in enumerate(zip(ids, mask, strict=True)):
        prompt = tuple(t for t, k in zip(tokens[:width], kept[:width], strict=True) if k)
        rows_of.setdefault(prompt, []).append(row)
    trees = [
        Tree(
            list(prompt),
            [[t for t, k in zip(ids[row][width:], mask[row][width:], strict=True) if k] for row in rows],
        )
        for prompt, rows in rows_of.items()
    ]
    return trees, list(rows_of.values())


def padded(trees: list[Tree], pad: int, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Trees as TRL's batch: ids and mask, each (B, P + C), prompts padded on the left, and the prompt width P."""
    width = max(len(tree.prompt) for tree in trees)
    longest = max(len(branch) for tree in trees for branch in tree.branches)
    ids: list[list[int]] = []
    mask: list[list[int]] = []
    for tree in trees:
        for branch in tree.branches:
            left, right = width - len(tree.prompt), longest - len(branch)
            ids.append([pad] * left + tree.prompt + branch + [pad] * right)
            mask.append([0] * left + [1] * (len(tree.prompt) + len(branch)) + [0] * right)
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device), width


def step_seed(seed: int, step: int, row: int) -> int:
    """A seed for one step's sampling noise, or one of its rows', (0, 2^63)."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{row}".encode()).digest()[:8], "big") >> 1
