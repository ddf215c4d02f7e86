"""One side of the benchmark, in a process of its own: stock TRL and lm-eval, or ours. It answers one call at a time."""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

BASE = "embedded:smollm2-135m-instruct"
SUITE = Path(__file__).parent.parent / "configs" / "suites" / "capability-53-offline.yaml"
STOCK_TOKENS = 6_000  # of a micro-batch, prompts repeated: stock TRL's activations of 9,000 do not fit in 24 GB


@dataclass(frozen=True)
class Case:
    """A training step: so many prompts, the completions of each, their lengths in tokens."""

    name: str
    prompts: int
    group: int
    prompt: int
    completion: int

    @property
    def rows(self) -> int:
        """Completions in all."""
        return self.prompts * self.group

    @property
    def stock_parts(self) -> int:
        """Micro-batches of as many rows each, in which stock TRL computes an update."""
        return math.ceil(self.rows * (self.prompt + self.completion) / STOCK_TOKENS)


def serve(calls: Connection, ours: bool, device: str) -> None:
    """Answer (method, arguments) with its result, or with the error's text, until the call is None."""
    torch.manual_seed(0)
    side = Side(ours, device)
    while (call := calls.recv()) is not None:
        method, arguments = call
        try:
            calls.send((getattr(side, method)(*arguments), None))
        except Exception as error:
            calls.send((None, f"{type(error).__name__}: {error}"))
            raise


class Side:
    """Holds the model and the present case's trainer."""

    def __init__(self, ours: bool, device: str) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        from models.linear import use_fastest
        from models.loading import load_tokenizer, resolve_model

        self.ours, self.device = ours, torch.device(device)
        self.tokenizer = load_tokenizer(resolve_model(BASE))
        if device == "cuda":  # the shape of Qwen2.5-1.5B with random weights: nothing has to be downloaded
            shape = AutoConfig.for_model(
                "qwen2", hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
                num_key_value_heads=2, vocab_size=len(self.tokenizer), max_position_embeddings=4096,
                tie_word_embeddings=True, torch_dtype="float32",
            )  # fmt: skip
            self.model: Any = AutoModelForCausalLM.from_config(shape, attn_implementation="sdpa").to(device)
        else:
            path = resolve_model(BASE)
            self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
        if ours:
            use_fastest(self.model)
        self.trainer: Any = None

    def sizes(self) -> dict[str, int]:
        """Parameters by what they cost, and the attention's width."""
        config, head = self.model.config, self.model.get_output_embeddings().weight.numel()
        linear = sum(m.weight.numel() for m in self.model.modules() if isinstance(m, torch.nn.Linear))
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        ranks = [m for m in self.model.modules() if isinstance(m, torch.nn.Linear) and m.weight.numel() != head]
        return {
            "body": linear - head,
            "head": head,
            "lora": sum(16 * (m.in_features + m.out_features) for m in ranks),
            "layers": config.num_hidden_layers,
            "attention": width * config.num_attention_heads,
            "kv": width * config.num_key_value_heads,
        }

    def prepare(self, case: Case) -> None:
        """A trainer for the case, with LoRA weights that are the same on both sides."""
        from datasets import Dataset
        from peft import LoraConfig
        from trl import GRPOConfig, GRPOTrainer

        from train.grpo import SharedPromptGRPOTrainer

        self._unload()
        words = self._words()
        prompts = [{"prompt": "".join(words[i : i + case.prompt])} for i in range(case.prompts)]
        self.rows = [row for row in prompts for _ in range(case.group)]
        settings: dict[str, Any] = {} if self.ours else {"generation_kwargs": {"min_new_tokens": case.completion}}
        self.parts = 1 if self.ours else case.stock_parts
        common: dict[str, Any] = {
            "model": self.model,
            "reward_funcs": [lambda completions, **_: [float(len(set(text))) for text in completions]],
            "args": GRPOConfig(
                output_dir=tempfile.mkdtemp(), per_device_train_batch_size=case.rows // self.parts,
                gradient_accumulation_steps=self.parts, num_generations=case.group,
                max_completion_length=case.completion, top_k=0, loss_type="dr_grpo", learning_rate=1e-6,
                bf16=self.device.type == "cuda", gradient_checkpointing=False, report_to="none", max_steps=10,
                disable_tqdm=True, **settings,
            ),
            "train_dataset": Dataset.from_list(self.rows),
            "processing_class": self.tokenizer,
            "peft_config": LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        }  # fmt: skip
        if self.ours:
            self.trainer = SharedPromptGRPOTrainer(token_budget=2048, record=lambda *_: None, keep=len, **common)
            self.trainer.eos_token_ids = []  # both sides decode to the full length
            self.trainer.checked = True
        else:
            self.trainer = GRPOTrainer(**common)
        trainer, generator = self.trainer, torch.Generator().manual_seed(1)
        for name, parameter in sorted(trainer.model.named_parameters()):
            if parameter.requires_grad:
                noise = 0.02 * torch.randn(parameter.shape, generator=generator)
                parameter.data.copy_(noise if "lora_B" in name else parameter.data + noise)
        trainer.create_optimizer_and_scheduler(10)
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = self.parts
        self.case, self.batch = case, self._batch(case)

    def update(self) -> dict[str, float]:
        """Loss and gradients of one batch."""
        rows = self.case.rows // self.parts
        cuts = [slice(first, first + rows) for first in range(0, self.case.rows, rows)]
        whole: Any = {"num_items_in_batch": self.batch["num_items_in_batch"]}
        batches = [{key: value[cut] for key, value in self.batch.items() if key not in whole} | whole for cut in cuts]

        def learn() -> None:
            for batch in batches:
                self.trainer._compute_loss(self.trainer.model, batch).backward()

        self.trainer.model.zero_grad()
        return self._timed(learn)

    def gradient(self, path: str) -> None:
        """Save the last update's gradients as one vector."""
        parts = [p.grad.flatten().cpu() for _, p in sorted(self.trainer.model.named_parameters()) if p.grad is not None]
        torch.save(torch.cat(parts), path)

    def rollout(self) -> dict[str, float]:
        """Sample the case's completions from prompts of tokens."""
        prompts = self.batch["prompt_ids"].tolist()
        return self._timed(lambda: self.trainer._generate_single_turn(prompts, None, {}, self.case.group))

    def step(self) -> dict[str, float]:
        """One step of the trainer: rollouts, rewards, loss, gradients, optimiser."""

        def whole() -> None:
            for _ in range(self.parts):  # the first of them samples
                self.trainer.training_step(self.trainer.model, self.rows, None)
            self.trainer.optimizer.step()
            self.trainer.optimizer.zero_grad()

        self.trainer._step = 0
        return self._timed(whole)

    def score(self, limit: int) -> dict[str, Any]:
        """Log-likelihoods of `limit` items of every benchmark of the offline suite, through lm-eval."""
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM

        from eval.capability import lm_eval_task, load_suite, quiet_lm_eval
        from eval.capability_tasks import load_items
        from models.scoring import SharedContextLM

        self._unload()
        self.model.eval()
        suite = load_suite(SUITE)
        requests: list[Instance] = []
        with quiet_lm_eval():
            for benchmark in suite.benchmarks:
                task = lm_eval_task(benchmark, load_items(benchmark, suite.seed, limit))
                task.build_all_requests(rank=0, world_size=1)
                requests += task.instances
        if self.ours:
            lm: Any = SharedContextLM(self.model, self.tokenizer, max_context=suite.max_context)
        else:
            stock: Any = HFLM  # its decorator hides its arguments
            lm = stock(
                pretrained=self.model, tokenizer=self.tokenizer, max_length=suite.max_context, batch_size=8,
                device=str(self.device),
            )  # fmt: skip
        scores: list[float] = []
        result = self._timed(lambda: scores.extend(score for score, _ in lm.loglikelihood(requests, disable_tqdm=True)))
        return {**result, "logps": scores, "tokens": sum(len(self.tokenizer.encode("".join(r.args))) for r in requests)}

    def _unload(self) -> None:
        """Take the last case's adapter and the trainer's patches off the model."""
        if self.trainer is not None:
            self.model = self.trainer.accelerator.unwrap_model(self.trainer.model).unload()
            self.model.__dict__.pop("peft_config", None)
            self.model.__dict__.pop("forward", None)
            self.trainer = None

    def _words(self) -> list[str]:
        """Words of one token each that stay so when they are joined."""
        vocabulary = self.tokenizer.get_vocab()
        words = sorted(w for w in vocabulary if w.startswith("Ġ") and w[1:].isascii() and w[1:].islower())
        return [word.replace("Ġ", " ") for word in words if len(word) > 5][:4000]

    def _batch(self, case: Case) -> dict[str, torch.Tensor]:
        """Random tokens in TRL's padded form."""
        g = torch.Generator().manual_seed(0)
        prompts = torch.randint(100, 40_000, (case.prompts, case.prompt), generator=g)
        batch = {
            "prompt_ids": prompts.repeat_interleave(case.group, 0),
            "prompt_mask": torch.ones(case.rows, case.prompt, dtype=torch.long),
            "completion_ids": torch.randint(100, 40_000, (case.rows, case.completion), generator=g),
            "completion_mask": torch.ones(case.rows, case.completion, dtype=torch.long),
            "advantages": torch.randn(case.rows, generator=g),
            "num_items_in_batch": torch.tensor(case.rows * case.completion),
        }
        return {key: value.to(self.device) for key, value in batch.items()}

    def _timed(self, work: Any) -> dict[str, float]:
        """Seconds, and the process's peak memory meanwhile, in MB."""
        reset_peak(self.device)
        started = time.perf_counter()
        work()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return {"seconds": time.perf_counter() - started, "peak_mb": peak_mb(self.device)}


def reset_peak(device: torch.device) -> None:
    """Forget the highest use of memory so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_mb(device: torch.device) -> float:
    """Highest use of memory since reset_peak, in MB (without /proc: since the process began)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
