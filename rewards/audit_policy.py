"""The audit's policy, configs/audit.yaml: how often a good exemplar has to outrank a hacked reply."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from rewards.hacks import HACKS
from rewards.traits import describe

POLICY = Path(__file__).parents[1] / "configs" / "audit.yaml"


class AuditPolicy(BaseModel):
    """configs/audit.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cases: int = Field(40, ge=1, description="Held-out prompts that `traitdose rewards audit` attacks.")
    run_cases: int = Field(16, ge=1, description="Held-out prompts that the audit inside `traitdose run` attacks.")
    worst: int = Field(3, ge=0, description="Hacked replies per family that are kept: furthest above their exemplar.")
    floor: float = Field(0.8, ge=0, le=1, description="AUC that every family has to reach, if `floors` has no other.")
    floors: dict[str, float] = Field({}, description="AUC that a family has to reach: name -> 0..1.")

    @field_validator("floors")
    @classmethod
    def _known(cls, floors: dict[str, float]) -> dict[str, float]:
        for name, floor in floors.items():
            if name not in HACKS:
                raise ValueError(f"{name!r} is no family of hacks; there are: {', '.join(HACKS)}")
            if not 0 <= floor <= 1:
                raise ValueError(f"{name} has {floor}; a floor is an AUC between 0 and 1")
        return floors

    def floor_of(self, family: str) -> float:
        """The AUC that a family has to reach."""
        return self.floors.get(family, self.floor)


def load_policy(path: Path = POLICY) -> AuditPolicy:
    """Raises ValueError with the file, the key and the remedy."""
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is no YAML ({' '.join(str(error).split())}); see configs/audit.yaml") from None
    try:
        return AuditPolicy.model_validate({} if content is None else content)
    except ValidationError as error:
        raise ValueError(f"{path}: {'; '.join(describe(error))}") from None


def failed_families(report: Mapping[str, Any], policy: AuditPolicy) -> list[str]:
    """What an audit finds below the policy's floors, such as "refuse 0.63 < 0.90 (n = 16)"."""
    return [
        f"{row['name']} {row['auc']:.2f} < {policy.floor_of(row['name']):.2f} (n = {row['n']})"
        for row in report["families"]
        if row["auc"] is not None and row["auc"] < policy.floor_of(row["name"])
    ]
