"""What a recipe says about which samples are trained on: read strictly, checked before anything starts. P6, P11."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ca2st.errors import UserInputError
from ca2st.training.journal import differences
from ca2st.training.resume import RunRecord, identity
from pipelines.errors import PlanError
from pipelines.loader import TrainLoader
from ray_jobs.cli import app
from ray_jobs.config.recipe import Recipe, identity_settings, recipe_document, recipe_from_document
from ray_jobs.config.recipe_file import key_lines, load_recipe
from ray_jobs.errors import RecipeError
from ray_jobs.runs.data import open_data, train_setup
from ray_jobs.runs.worker import preflight
from sharding.format.shard_set import LabelSpace
from support.fake_shards import make_samples, make_shard_set

HEAD = """\
name = "mixed"

[model]
kind = "ca2st"
dim = 16
depth = 2
num_heads = 2

[clip]
num_frames = 4
crop_size = 32
mel_rows = 48

[training]
epochs = 2
global_batch_size = 4
per_device_batch_size = 4

[optim]
warmup_epochs = 0.5

"""
MIXTURE = """\
[[data.mixture]]
train = "{root}/one"
weight = 2.0

[[data.mixture]]
train = "{root}/two"
weight = 1.0
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sets of the same classes, of 10 and 6 samples, and one of others."""
    root = tmp_path_factory.mktemp("sets")
    make_shard_set(root / "one", make_samples(10, num_frames=4))
    make_shard_set(root / "two", make_samples(6, num_frames=5))
    make_shard_set(root / "other", make_samples(4), label_spaces=(LabelSpace(name="label", classes=("a", "b", "c")),))
    return root


def recipe_of(folder: Path, data: str, *overrides: str) -> Recipe:
    path = folder / "mixed.toml"
    path.write_text(HEAD + data)
    return load_recipe(str(path), overrides)


def test_a_mixture_of_a_recipe_becomes_the_loaders_order(root: Path, tmp_path: Path) -> None:
    choices = '[data]\nrepeats = 2\nremainder = "wrap"\n[data.balance]\nrule = "sqrt"\n[data.select]\nlimit = 12\n'
    recipe = recipe_of(tmp_path, choices + MIXTURE.format(root=root))
    data = preflight(recipe)
    assert [one.root.name for one in data.train_sets] == ["one", "two"]
    assert data.fingerprints.keys() == {"train", "train_2"}
    assert data.datasets == {"train": "fake"}
    plan = train_setup(recipe, data).plan()
    assert (plan.num_samples, plan.num_steps) == (12, 6)
    with TrainLoader(train_setup(recipe, data, rank=0, world_size=1)) as loader:
        assert loader.record == plan.record
        assert (loader.record.repeats, loader.record.remainder, loader.record.balance.rule) == (2, "wrap", "sqrt")
        assert [share.weight for share in loader.record.mixture] == [2.0, 1.0]
        assert len(list(loader.batches(0))) == 6


def test_a_recipe_of_several_sets_is_kept_and_read_again(root: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, '[data.select]\nclasses = ["red"]\n' + MIXTURE.format(root=root))
    assert recipe_from_document(recipe_document(recipe)) == recipe


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            '[[data.mixture]]\ntrain = "a"\nwieght = 1.0\n',
            r"mixed.toml:24: data.mixture.0.wieght: unknown key.*'weight'",
        ),
        (
            '[[data.mixture]]\ntrain = "a"\n[[data.mixture]]\ntrain = "b"\nweight = "x"\n',
            r"mixed.toml:26: data.mixture.1.weight: ",
        ),
        ('[data]\ntrain = "a"\n[[data.mixture]]\ntrain = "b"\n', "mixture: expected no data.train beside it"),
        ('[data.synthetic]\n[[data.mixture]]\ntrain = "b"\n', "mixture: expected no data.synthetic beside it"),
        (
            '[[data.mixture]]\ntrain = "a"\nweight = 1.0\n[[data.mixture]]\ntrain = "b"\n',
            "mixture: expected a weight for every set or for none, found none for b",
        ),
        (
            '[[data.mixture]]\ntrain = "a"\nweight = -1.0\n',
            r"mixed.toml:\d+: data: mixture weights: expected numbers > 0, found -1.0",
        ),
        (
            '[[data.mixture]]\ntrain = "a"\nweight = 1.0\n[[data.mixture]]\ntrain = "b"\nweight = 0.0\n',
            "mixture weights: expected numbers > 0, found 0.0; leave a set out to read none of it",
        ),
        ("[data]\nrepeats = 0\n", "repeats: expected at least 1, found 0"),
        ('[data]\nremainder = "pad"\n', "mixed.toml:23: data.remainder: "),
        ('[data.balance]\nrule = "sqare"\n', "mixed.toml:23: data.balance.rule: "),
        ("[data.select]\nlimit = 0\n", "mixed.toml:23: data.select: select.limit: expected at least 1"),
        ('[data.select]\nclases = ["a"]\n', r"mixed.toml:23: data.select.clases: unknown key \(did you mean 'classes'"),
    ],
)
def test_a_mistake_in_what_is_read_is_told_at_its_line(tmp_path: Path, data: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_of(tmp_path, data)


def test_sets_of_other_classes_are_refused_by_name_before_anything_starts(root: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, MIXTURE.format(root=root).replace("two", "other"))
    with pytest.raises(UserInputError, match=r"label space 'label': .*one has 3 classes and .*other 3: only in"):
        preflight(recipe)


def test_p6_too_few_samples_are_refused_before_any_worker_starts(root: Path, tmp_path: Path) -> None:
    few = recipe_of(tmp_path, f'[data]\ntrain = "{root}/two"\n[data.select]\nlimit = 3\n')
    with pytest.raises(PlanError, match="3 samples, global_batch_size 4, world_size 1"):
        preflight(few)
    many = recipe_of(tmp_path, f'[data]\ntrain = "{root}/two"\n', "launch.workers=7", "training.global_batch_size=6")
    with pytest.raises(PlanError, match="6 samples, global_batch_size 6, world_size 7"):
        preflight(many)
    odd = recipe_of(tmp_path, f'[data]\ntrain = "{root}/two"\n', "launch.workers=3")
    with pytest.raises(PlanError, match=r"global_batch_size 4 on 3 ranks: every rank needs two positions"):
        preflight(odd)


def test_p11_what_is_read_is_part_of_a_runs_identity_and_folders_are_not(root: Path, tmp_path: Path) -> None:
    def settings(data: str, *overrides: str) -> dict[str, object]:
        return identity_settings(recipe_of(tmp_path, data, *overrides))

    plain = settings(MIXTURE.format(root=root))
    assert settings(MIXTURE.format(root="elsewhere")) == plain
    changed = {"data.repeats=2": "data.repeats", "data.select.limit=3": "data.select.limit"}
    changed |= {"data.balance.rule=full": "data.balance.rule", "data.epoch_samples=8": "data.epoch_samples"}
    for override, field in changed.items():
        found = differences(plain, settings(MIXTURE.format(root=root), override))
        assert [line.split(": ")[0] for line in found] == [field]


def test_p11_a_resume_names_what_was_changed_and_allows_another_number_of_workers(root: Path, tmp_path: Path) -> None:
    def kept(*overrides: str, data: str = MIXTURE) -> dict[str, object]:
        recipe = recipe_of(tmp_path, data.format(root=root), *overrides)
        opened = open_data(recipe)
        record = RunRecord(
            manifests=opened.fingerprints,
            recipe=identity_settings(recipe),
            loader=asdict(train_setup(recipe, opened).plan().record),
        )
        training = recipe.training
        return identity(record, seed=training.seed, global_batch_size=training.global_batch_size)

    def changed(*overrides: str, data: str = MIXTURE) -> list[str]:
        return [line.split(": ")[0] for line in differences(kept(), kept(*overrides, data=data))]

    assert changed("launch.workers=2", "data.loader.fetch_threads=1") == []
    assert changed(data=MIXTURE.replace("2.0", "3.0")) == ["loader.mixture.0.weight"]
    assert changed("data.select.limit=9") == ["loader.selection.limit", "recipe.data.select.limit"]
    assert changed("training.seed=5") == ["loader.seed", "recipe.training.seed", "seed"]
    assert "global_batch_size" in changed("training.global_batch_size=8")
    other_sets = changed(data=MIXTURE.replace("one", "held").replace("two", "one").replace("held", "two"))
    assert {"manifests.train", "loader.manifest_fingerprint", "loader.mixture.1.fingerprint"} <= set(other_sets)


def test_lines_of_tables_in_an_array_are_found_by_their_number() -> None:
    lines = key_lines(
        '[data]\nseed = 1\n[[data.mixture]]\ntrain = "a"\n\n[[data.mixture]]\ntrain = "b"\n[clip]\nmel = 2\n'
    )
    assert lines["data.mixture"] == lines["data.mixture.0"] == 3
    assert (lines["data.mixture.0.train"], lines["data.mixture.1.train"], lines["clip.mel"]) == (4, 7, 9)


def test_a_validation_set_of_other_classes_is_refused_with_the_classes_that_differ(tmp_path: Path) -> None:
    other = (LabelSpace(name="label", classes=("red", "green", "blau")),)
    make_shard_set(tmp_path / "train", make_samples(3))
    make_shard_set(tmp_path / "val", make_samples(3), label_spaces=other)
    sets = f'[data]\ntrain = "{tmp_path}/train"\nvalidation = "{tmp_path}/val"\n'
    message = (
        "label space 'label': validation has 3 classes that are not the 3 of training: only in training 'blue'; only "
        "in validation 'blau'; convert both with one class list"
    )
    with pytest.raises(UserInputError, match=message):
        open_data(recipe_of(tmp_path, sets))


def test_the_training_set_is_the_first_of_a_mixture(root: Path, tmp_path: Path) -> None:
    data = open_data(recipe_of(tmp_path, MIXTURE.format(root=root)))
    assert data.train.root == root / "one"
    assert data.classes == {"label": ["red", "green", "blue"]}


@pytest.mark.parametrize(
    ("kind", "mixing", "message"),
    [
        ("cast", 'spectrogram = "cutmix"', "mixing.spectrogram: expected 'mixup' for cast, which does not hear"),
        ("audio", "switch_probability = 0.5", "switch_probability: expected 0 for audio, which does not see"),
    ],
)
def test_a_box_that_the_model_never_sees_is_refused(
    kind: str, mixing: str, message: str, root: Path, tmp_path: Path
) -> None:
    text = f"[data]\ntrain = '{root}/one'\n[data.augment.mixing]\nprobability = 0.9\n{mixing}\n"
    recipe = recipe_of(tmp_path, text, f"model.kind={kind}")
    with pytest.raises(UserInputError, match=message):
        preflight(recipe)


def test_an_empty_list_of_targets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="targets: expected at least one label space, found none"):
        recipe_of(tmp_path, "[data]\ntargets = []\n")


def test_data_given_on_the_command_line_stands_for_a_mixture(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "mixed.toml"
    path.write_text(HEAD + MIXTURE.format(root=root))
    for options, num_samples in ([], 16), (["--data", str(root / "two")], 6):
        done = CliRunner().invoke(app, ["train", str(path), "--dry-run", "--json", *options])
        assert done.exit_code == 0, done.exception
        assert json.loads(done.stdout)["num_samples"] == num_samples
