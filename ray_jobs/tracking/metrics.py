"""The one way in which numbers become metrics of a run in MLflow."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ray_jobs.tracking.events import Value
from ray_jobs.tracking.names import clean_name
from ray_jobs.tracking.run_record import Say, log_tags

if TYPE_CHECKING:
    from mlflow import MlflowClient

NOT_FINITE_TAG = "ca2st.not_finite"
_CALL_VALUES = 1000
"""MLflow takes no more in a call."""


class MetricWriter:
    """Sends numbers under names that MLflow takes; tells each name that it changes once."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._names: dict[str, str] = {}

    def write(self, client: "MlflowClient", run_id: str, values: Sequence[Value]) -> int:
        """Send `values`; returns how many were sent.

        NaN and infinities, which MLflow's charts and comparisons cannot hold, become tags that name the step.

        Raises:
            MlflowException: the store cannot be reached; sending all again makes none of them double.
        """
        from mlflow.entities import Metric

        finite = [value for value in values if math.isfinite(value.value)]
        for start in range(0, len(finite), _CALL_VALUES):
            part = finite[start : start + _CALL_VALUES]
            metrics = [Metric(self._name(one.name), one.value, one.milliseconds, one.step) for one in part]
            client.log_batch(run_id, metrics=metrics)
        steps = {value.name: value.step for value in values if not math.isfinite(value.value)}
        self._tag_not_finite(client, run_id, steps)
        return len(finite)

    def _tag_not_finite(self, client: "MlflowClient", run_id: str, steps: Mapping[str, int]) -> None:
        if steps:
            tags = {f"{NOT_FINITE_TAG}.{name}": f"at step {step}" for name, step in steps.items()}
            log_tags(client, run_id, tags, self._say)

    def _name(self, name: str) -> str:
        if name not in self._names:
            clean = self._names[name] = clean_name(name)
            if clean != name:
                self._say(f"metric {name!a} is called {clean}")
        return self._names[name]
