"""One training process of the demo: it trains one real model on one real data set and logs it as one run.

Read `train` as an example of a training script; nothing in it knows that other runs are going on. `send` reports
progress to the screen of the demo and has no part in tracking.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["JOBS", "Job", "Progress", "train"]

DatasetName = Literal["digits", "breast_cancer", "wine"]
ModelName = Literal["mlp", "sgd", "gradient_boosting"]

VALIDATE_EVERY: Final = 10
"""Steps between two validations of the models that learn batch by batch."""
STAGES_AT_ONCE: Final = 250
"""Boosting stages grown between two looks at the curve."""
PROGRESS_EVERY: Final = 100
"""Steps between two progress messages to the screen."""
SINGLE_THREAD: Final = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
"""Set to 1: ten processes share the machine, so each computes in one thread."""


@dataclass(frozen=True, slots=True)
class Job:
    """What one training process does."""

    name: str
    dataset: DatasetName
    model: ModelName
    steps: int
    """Mini-batches, or boosting stages."""
    params: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Progress:
    """A message from a training process to the screen."""

    name: str
    step: int
    val_accuracy: float | None
    points: int
    """Metric points logged so far."""
    run_id: str = ""
    error: str = ""
    done: bool = False


JOBS: Final = (
    Job("digits-mlp-small", "digits", "mlp", 2000, {"hidden": 32, "lr": 0.003, "batch_size": 32}),
    Job("digits-mlp-wide", "digits", "mlp", 2000, {"hidden": 96, "lr": 0.001, "batch_size": 32}),
    Job("digits-mlp-hot", "digits", "mlp", 2000, {"hidden": 64, "lr": 0.03, "batch_size": 32}),
    Job("cancer-mlp", "breast_cancer", "mlp", 2000, {"hidden": 32, "lr": 0.001, "batch_size": 32}),
    Job("cancer-sgd", "breast_cancer", "sgd", 3000, {"alpha": 0.001, "batch_size": 32}),
    Job("cancer-sgd-strong-l2", "breast_cancer", "sgd", 3000, {"alpha": 0.3, "batch_size": 32}),
    Job("cancer-boost-slow", "breast_cancer", "gradient_boosting", 2000, {"lr": 0.01, "depth": 2}),
    Job("cancer-boost-fast", "breast_cancer", "gradient_boosting", 2000, {"lr": 0.1, "depth": 1}),
    Job("wine-sgd", "wine", "sgd", 2000, {"alpha": 0.01, "batch_size": 16}),
    Job("wine-boost", "wine", "gradient_boosting", 2000, {"lr": 0.05, "depth": 2}),
)
"""The demo's runs, sized for two or three seconds of one core each."""


@dataclass(frozen=True, slots=True)
class Split:
    """A data set, scaled to zero mean and unit variance, in two parts."""

    train_x: NDArray[np.float64]
    """Shape (rows, features)."""
    train_y: NDArray[np.int64]
    val_x: NDArray[np.float64]
    val_y: NDArray[np.int64]
    labels: list[str]
    digest: str
    """First 16 hex digits of the SHA-256 of features and target as they are shipped."""


def load(name: DatasetName) -> Split:
    """Load a data set that scikit-learn ships (nothing is downloaded) and split it 75:25, always the same way."""
    import sklearn
    from sklearn import datasets
    from sklearn.model_selection import train_test_split
    from sklearn.preprocessing import StandardScaler

    # Thousands of small steps on data known to be sound: most of the time would go into checking it again.
    sklearn.set_config(assume_finite=True, skip_parameter_validation=True)
    raw = getattr(datasets, f"load_{name}")()
    digest = hashlib.sha256(raw.data.tobytes() + raw.target.tobytes()).hexdigest()[:16]
    train_x, val_x, train_y, val_y = train_test_split(
        raw.data, raw.target, test_size=0.25, random_state=7, stratify=raw.target
    )
    scaler = StandardScaler().fit(train_x)
    labels = [str(label) for label in raw.target_names]
    return Split(scaler.transform(train_x), train_y, scaler.transform(val_x), val_y, labels, digest)


def train(job: Job, tracking_uri: str, session: str, send: Callable[[Progress], None]) -> None:
    """Train `job` and log it as one run of the experiment `demo-<data set>`.

    Args:
        session: value of the tag `demo.session`, which marks the runs of one demo.
    """
    import runstream

    runstream.set_tracking_uri(tracking_uri)
    runstream.set_experiment(f"demo-{job.dataset.replace('_', '-')}")
    with runstream.start_run(run_name=job.name, tags={"demo.session": session, "model": job.model}) as run:
        run_id = run.info.run_id
        data = load(job.dataset)
        runstream.log_params({"model": job.model, "steps": job.steps, "seed": 7, **job.params})
        _log_dataset(job, data)
        points = 0
        accuracy: float | None = None
        send(Progress(job.name, 0, None, 0, run_id))
        model = _build(job)
        for step, metrics in _learn(job, model, data):
            runstream.log_metrics(metrics, step=step)
            points += len(metrics)
            accuracy = metrics.get("val_accuracy", accuracy)
            if step % PROGRESS_EVERY == 0:
                send(Progress(job.name, min(step, job.steps), accuracy, points, run_id))
        for key, value in _final_scores(model, data).items():
            runstream.log_metric(key, value, step=job.steps)
            points += 1
        _log_artifacts(job, model, data)
        runstream.set_tag("mlflow.note.content", f"{job.model} on scikit-learn's {job.dataset} data, {job.steps} steps")
    send(Progress(job.name, job.steps, accuracy, points, run_id, done=True))


def _log_dataset(job: Job, data: Split) -> None:
    import runstream

    features = data.train_x.shape[1]
    runstream.log_input(
        name=f"sklearn-{job.dataset}",
        digest=data.digest,
        source=f"sklearn.datasets.load_{job.dataset}",
        source_type="python",
        schema={"features": f"float64[{features}]", "target": f"int64, {len(data.labels)} classes"},
        profile={"train_rows": len(data.train_y), "validation_rows": len(data.val_y)},
        context="training",
    )


def _build(job: Job) -> Any:
    """The untrained scikit-learn model of `job`."""
    import numpy as np

    random = np.random.RandomState(7)  # one generator for all steps; a number would seed a new one at each
    if job.model == "mlp":
        from sklearn.neural_network import MLPClassifier

        return MLPClassifier((job.params["hidden"],), learning_rate_init=job.params["lr"], random_state=random)
    if job.model == "sgd":
        from sklearn.linear_model import SGDClassifier

        return SGDClassifier(loss="log_loss", alpha=job.params["alpha"], random_state=random)
    from sklearn.ensemble import GradientBoostingClassifier

    return GradientBoostingClassifier(
        n_estimators=STAGES_AT_ONCE,
        warm_start=True,
        learning_rate=job.params["lr"],
        max_depth=job.params["depth"],
        subsample=0.8,
        random_state=7,
    )


def _learn(job: Job, model: Any, data: Split) -> Iterator[tuple[int, dict[str, float]]]:
    """Train step by step; yields (step from 1, metrics of the step)."""
    if job.model == "gradient_boosting":
        yield from _boost(job, model, data)
    else:
        yield from _mini_batches(job, model, data)


def _mini_batches(job: Job, model: Any, data: Split) -> Iterator[tuple[int, dict[str, float]]]:
    import numpy as np

    random = np.random.default_rng(7)
    classes = np.arange(len(data.labels))
    size = job.params["batch_size"]
    smooth = float("nan")
    for step in range(1, job.steps + 1):
        chosen = random.integers(0, len(data.train_y), size)
        x, y = data.train_x[chosen], data.train_y[chosen]
        model.partial_fit(x, y, classes=classes)
        # An MLP knows its batch loss; the linear model's is computed from its own probabilities.
        loss = float(model.loss_) if job.model == "mlp" else _log_loss(model.predict_proba(x), y)
        smooth = loss if step == 1 else 0.98 * smooth + 0.02 * loss
        metrics = {"train_loss": loss, "train_loss_smooth": smooth}
        if step % VALIDATE_EVERY == 0:
            metrics |= _validate(model.predict_proba(data.val_x), data.val_y)
        yield step, metrics


def _boost(job: Job, model: Any, data: Split) -> Iterator[tuple[int, dict[str, float]]]:
    """Grow the ensemble some stages at a time, so that its curve appears while it trains."""
    done = 0
    while done < job.steps:
        model.n_estimators = min(done + STAGES_AT_ONCE, job.steps)
        model.fit(data.train_x, data.train_y)
        for stage, probabilities in enumerate(model.staged_predict_proba(data.val_x), start=1):
            if stage <= done:
                continue
            metrics = {"train_loss": float(model.train_score_[stage - 1])}
            yield stage, metrics | _validate(probabilities, data.val_y)
        done = model.n_estimators


def _log_loss(probabilities: NDArray[np.float64], target: NDArray[np.int64]) -> float:
    """Mean negative log likelihood, natural logarithm."""
    import numpy as np

    chosen = probabilities[np.arange(len(target)), target]
    return float(-np.log(np.maximum(chosen, 1e-15)).mean())


def _validate(probabilities: NDArray[np.float64], target: NDArray[np.int64]) -> dict[str, float]:
    accuracy = float((probabilities.argmax(axis=1) == target).mean())
    return {"val_loss": _log_loss(probabilities, target), "val_accuracy": accuracy}


def _final_scores(model: Any, data: Split) -> dict[str, float]:
    from sklearn.metrics import f1_score

    predicted = model.predict(data.val_x)
    return {
        "final_accuracy": float((predicted == data.val_y).mean()),
        "final_f1": float(f1_score(data.val_y, predicted, average="macro")),
    }


def _log_artifacts(job: Job, model: Any, data: Split) -> None:
    import joblib
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay, classification_report

    import runstream

    predicted = model.predict(data.val_x)
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.add_subplot()
    ConfusionMatrixDisplay.from_predictions(
        data.val_y, predicted, display_labels=data.labels, ax=axes, colorbar=False, cmap="Blues"
    )
    axes.set_title(job.name)
    runstream.log_figure(figure, "confusion_matrix.png")
    report = classification_report(data.val_y, predicted, target_names=data.labels, zero_division=0)
    runstream.log_text(f"{job.name}\n\n{report}", "report.txt")
    with tempfile.TemporaryDirectory(prefix="runstream-demo-") as folder:
        path = Path(folder) / "model.joblib"
        joblib.dump(model, path, compress=3)
        runstream.log_artifact(path, "model")


def prepare_environment() -> None:
    """Make scikit-learn compute in one thread; call before it is first imported. Leaves what the user has set."""
    for name in SINGLE_THREAD:
        os.environ.setdefault(name, "1")
