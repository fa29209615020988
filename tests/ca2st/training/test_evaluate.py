from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from ca2st.batch import ClipBatch
from ca2st.training.errors import IncompleteEvaluationError, LabelRangeError
from ca2st.training.evaluate import Scored, evaluate, joined, scored_batches
from support.tiny_training import TARGETS, TinyEvaluation, TinyModel, batch_of, clip, fresh_accelerator, tiny_settings


def run(source: TinyEvaluation, model: TinyModel | None = None, **changes: object) -> dict[str, float]:
    accelerator = fresh_accelerator(tiny_settings(Path("unused")))
    options = {"targets": TARGETS, "per_device_batch_size": 3} | changes
    return evaluate(model or TinyModel(), source, accelerator=accelerator, **options)


def score(source: TinyEvaluation, model: TinyModel | None = None, **changes: object) -> Scored:
    accelerator = fresh_accelerator(tiny_settings(Path("unused")))
    options = {"targets": TARGETS, "per_device_batch_size": 3} | changes
    return joined(scored_batches(model or TinyModel(), source, accelerator=accelerator, **options))


def test_probabilities_are_the_mean_of_the_views_softmax() -> None:
    model = TinyModel().eval()
    result = score(TinyEvaluation(num_samples=4), model)
    assert result.sample_ids == ("val-0", "val-1", "val-2", "val-3")
    assert result.num_views.tolist() == [2, 2, 2, 2]
    views = batch_of([clip("val-2", view=view) for view in range(2)], ["val-2", "val-2"])
    with torch.no_grad():
        logits = model(views.normalised_video(), views.mel, views.intervals_seconds).logits["noun"]
    torch.testing.assert_close(torch.from_numpy(result.probabilities["noun"][2]), logits.softmax(1).mean(0))
    assert result.labels[3].tolist() == [3, 3]
    assert float(result.probabilities["verb"][3].sum()) == pytest.approx(1)


def test_the_model_is_left_in_the_mode_it_was_in_and_unchanged() -> None:
    model = TinyModel().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run(TinyEvaluation(), model)
    assert model.training
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_micro_batches_do_not_change_the_result() -> None:
    first, second = (score(TinyEvaluation(), per_device_batch_size=size) for size in (1, 64))
    np.testing.assert_allclose(first.probabilities["verb"], second.probabilities["verb"], rtol=1e-5)
    one, other = (run(TinyEvaluation(), per_device_batch_size=size) for size in (1, 64))
    assert one == other
    assert set(one) >= {"verb_top1", "noun_top5", "action_top1"}


class Spoilt(TinyEvaluation):
    """Batches changed on their way out."""

    def __init__(self, spoil: str) -> None:
        super().__init__(num_samples=5)
        self.spoil = spoil

    def batches(self) -> Iterator[ClipBatch]:
        for index, batch in enumerate(super().batches()):
            if index == 3:
                if self.spoil == "lost":
                    continue
                if self.spoil == "renamed":
                    batch = replace(batch, sample_ids=("other", "other"))
                if self.spoil == "twice":
                    yield batch
                if self.spoil == "one view":
                    batch = next(batch.split(1))
                if self.spoil == "label":
                    batch = replace(batch, labels=batch.labels + 7)
            yield batch


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("lost", "found 1 never scored: val-3"),
        ("renamed", "found 1 never scored: val-3"),
        ("twice", "found 1 scored more than once: val-3"),
        ("one view", "found 1 scored by another number of views than the rest: val-3"),
    ],
)
def test_p13_no_metric_is_reported_unless_every_sample_is_scored_exactly_once(spoil: str, message: str) -> None:
    with pytest.raises(IncompleteEvaluationError, match=message):
        run(Spoilt(spoil))


class TwoAlike:
    """Two ranks that were dealt the same samples, as one sees the other."""

    rank, world_size, is_main = 0, 2, True

    def gather(self, value: Any) -> list[Any]:
        return [value, value]

    def together(self, action: Callable[[], Any]) -> list[Any]:
        return self.gather(action())

    def on_main(self, action: Callable[[], Any]) -> Any:
        return action()


def test_a_sample_that_two_ranks_scored_is_named_once() -> None:
    with pytest.raises(IncompleteEvaluationError, match="found 1 scored more than once: val-0; no metric"):
        run(TinyEvaluation(num_samples=1), ranks=TwoAlike())


def test_p13_a_source_without_names_is_held_to_its_number_of_samples() -> None:
    class Nameless:
        num_samples = 6

        def batches(self) -> Iterator[ClipBatch]:
            return TinyEvaluation(num_samples=5).batches()

    with pytest.raises(IncompleteEvaluationError, match=r"expected 6 samples .* found 5 scored"):
        run(Nameless())


def test_an_empty_set_has_no_metrics() -> None:
    with pytest.raises(IncompleteEvaluationError, match=r"expected 0 samples \(at least one\), found 0"):
        run(TinyEvaluation(num_samples=0))


def test_a_label_beyond_the_head_is_named() -> None:
    with pytest.raises(LabelRangeError, match=r"sample val-3: verb label expected in 0\.\.4"):
        run(Spoilt("label"))


class Several(TinyEvaluation):
    """Clips of any number of labels of one target."""

    def batches(self) -> Iterator[ClipBatch]:
        for batch in super().batches():
            numbers = torch.tensor([int(key.rpartition("-")[2]) for key in batch.sample_ids])
            hot = torch.stack([(numbers % (place + 2) == 0).long() for place in range(5)], dim=1)
            yield replace(batch, labels=hot, labelling="several")


def test_samples_of_several_labels_have_a_mean_average_precision_and_top_1() -> None:
    targets = {"verb": 5}
    model = TinyModel(classes=targets)
    found = run(Several(num_samples=23), model, targets=targets)
    scored = score(Several(num_samples=23), model, targets=targets)
    expected = average_precision_score(scored.labels, scored.probabilities["verb"], average="macro")
    hits = scored.labels[np.arange(23), scored.probabilities["verb"].argmax(1)]
    assert found == pytest.approx({"map": expected, "top1": hits.mean()})


def test_samples_without_labels_are_scored_and_have_no_metric() -> None:
    class Unlabelled(TinyEvaluation):
        def batches(self) -> Iterator[ClipBatch]:
            for batch in super().batches():
                yield replace(batch, labels=batch.labels[:, :0], labelling="none")

    assert run(Unlabelled(num_samples=3)) == {}
    assert score(Unlabelled(num_samples=3)).labels.shape == (3, 0)
