"""The paper's learning-rate schedule for torchtitan's trainer."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from torchtitan.components.optimizer import LRSchedulersContainer

from manifold_hc.errors import ConfigError


class StepSchedule(LRSchedulersContainer):
    """Linear warm-up, a constant rate, and two steps down (arXiv 2512.24880, appendix)."""

    @dataclass(kw_only=True, slots=True)
    class Config(LRSchedulersContainer.Config):
        """torchtitan's configuration, of which `warmup_steps` and `total_steps` apply."""

        def build(self, *, optimizers: Any, training_steps: int) -> "StepSchedule":
            """Build the schedule of a run; raise ConfigError for a decay that it does not have."""
            if self.decay_ratio is not None:
                raise ConfigError(
                    "lr_scheduler.decay_ratio: the step schedule has 0.316 of the rate from 80 % "
                    f"of the steps on and 0.1 from 90 % on, but it is {self.decay_ratio}; leave it "
                    "out"
                )
            from manifold_hc.training.config import OptimizerConfig
            from manifold_hc.training.optimizer import learning_rate

            steps = training_steps if self.total_steps is None else self.total_steps
            factors = OptimizerConfig(lr=1.0, warmup=self.warmup_steps, schedule="step")
            return StepSchedule(optimizers, partial(learning_rate, steps=steps, config=factors))
