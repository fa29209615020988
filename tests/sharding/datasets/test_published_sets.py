"""Every published dataset from its owners' file and a small media tree to batches of the loader."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from ca2st.spec import ClipSpec
from pipelines import EvaluationViews, LoaderConfig, SamplingConfig, read_batches
from sharding.conversion import convert
from sharding.datasets import DatasetRequest, read_dataset
from sharding.format.shard_set import read_shard_set
from sharding.settings import ConversionConfig, RejectBudget
from sharding.source import MISSING_MEDIA
from sharding.verify import verify_shard_set
from support.annotations import write_lines
from support.media import Sound, make_clip

pytestmark = pytest.mark.slow
EK100 = (
    "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,start_frame,stop_frame,"
    "narration,verb,verb_class,noun,noun_class,all_nouns,all_noun_classes"
)
SOUNDS = "participant_id,video_id,start_timestamp,stop_timestamp,start_sample,stop_sample"
SEGMENT = '"video_id": "P01-2024", "start_timestamp": 0.2, "end_timestamp": 0.7, "main_action_classes"'
ACTIVITY = {"subset": "validation", "annotations": [{"segment": [0.1, 0.6], "label": "Ballet"}]}


@dataclass(frozen=True, kw_only=True)
class Form:
    """A dataset as its owners and its users keep it: two samples, and one whose media are missing."""

    file: str
    lines: tuple[str, ...]
    media: tuple[str, ...]
    labels: tuple[tuple[int, ...], ...]


FORMS = {
    "epic_kitchens_100": Form(
        file="EPIC_100_validation.csv",
        lines=(
            EK100,
            "P01_1_0,P01,P01_1,,00:00:00.10,00:00:00.50,1,2,x,take,0,plate,2,['plate'],[2]",
            "P01_1_1,P01,P01_1,,00:00:00.40,00:00:00.90,1,2,x,wash,2,pan,5,['pan'],[5]",
            "P01_9_0,P01,P01_9,,00:00:00.40,00:00:00.90,1,2,x,wash,2,pan,5,['pan'],[5]",
        ),
        media=("EPIC-KITCHENS/P01/videos/P01_1.mp4",),
        labels=((0, 2), (2, 5)),
    ),
    "epic_sounds": Form(
        file="EPIC_Sounds_validation.csv",
        lines=(
            f"annotation_id,{SOUNDS},description,class,class_id",
            "P01_1_0,P01,P01_1,00:00:00.100,00:00:00.500,1,2,x,rustle,4",
            "P01_1_1,P01,P01_1,00:00:00.300,00:00:00.900,1,2,x,water,5",
            "P01_9_0,P01,P01_9,00:00:00.300,00:00:00.900,1,2,x,water,5",
        ),
        media=("P01_1.mp4",),
        labels=((4,), (5,)),
    ),
    "hd_epic": Form(
        file="HD_EPIC_Narrations.jsonl",
        lines=(
            f'{{"unique_narration_id": "P01-2024-1", {SEGMENT}: [[61, 165]]}}',
            f'{{"unique_narration_id": "P01-2024-2", {SEGMENT}: [[3, 97]]}}',
            f'{{"unique_narration_id": "P01-2025-1", {SEGMENT.replace("2024", "2025")}: [[3, 97]]}}',
        ),
        media=("HD-EPIC/Videos/P01/P01-2024.mp4",),
        labels=((61, 165), (3, 97)),
    ),
    "hd_epic_sounds": Form(
        file="HD_EPIC_Sounds.csv",
        lines=(
            f"{SOUNDS},class,class_id",
            "P01,P01-2024,00:00:00.100,00:00:00.500,4800,24000,rustle,4",
            "P01,P01-2024,00:00:00.100,00:00:00.500,4800,24000,background,13",
            "P01,P01-2025,00:00:00.100,00:00:00.500,4800,24000,background,13",
        ),
        media=("P01/P01-2024.mp4",),
        labels=((4,), (13,)),
    ),
    "something_something_v2": Form(
        file="validation.json",
        lines=(json.dumps([{"id": name, "template": "Closing [something]"} for name in ("7", "8", "9")]),),
        media=("7.webm", "8.mp4"),
        labels=((5,), (5,)),
    ),
    "kinetics_400": Form(
        file="val.csv",
        lines=(
            "label,youtube_id,time_start,time_end,split",
            "abseiling,0wR5jVB-WPk,417,427,val",
            "air drumming,--nQbRBEz2s,104,114,val",
            "air drumming,gone5678901,104,114,val",
        ),
        media=("val/0wR5jVB-WPk.mp4", "val/air_drumming/--nQbRBEz2s_000104_000114.mp4"),
        labels=((0,), (1,)),
    ),
    "kinetics_sound": Form(
        file="my_test.txt",
        lines=("-3Mwkq-7TV4_2,10,23", "-74csnCOiUs_0,10,14", "gone5678901_0,10,14"),
        media=("test/-3Mwkq-7TV4_000002_000012.mp4", "-74csnCOiUs.mp4"),
        labels=((23,), (14,)),
    ),
    "activitynet": Form(
        file="activity_net.v1-3.min.json",
        lines=(json.dumps({"database": {"--6bJUbfpnQ": ACTIVITY, "QOlSCBRmfWY": ACTIVITY, "gone5678901": ACTIVITY}}),),
        media=("v_--6bJUbfpnQ.mp4", "validation/QOlSCBRmfWY.mkv"),
        labels=((6,), (6,)),
    ),
    "vgg_sound": Form(
        file="test.csv",
        lines=(
            "-XxUW9gW6mc_000060.mp4,helicopter",
            "2Dm0VjW8oM__000001.mp4,orchestra",
            "gone5678901_000001.mp4,orchestra",
        ),
        media=("-XxUW9gW6mc_60000_70000.mp4", "2Dm0VjW8oM__1.mp4"),
        labels=((12,), (16,)),
    ),
    "ucf_101": Form(
        file="testlist01.txt",
        lines=(
            "HandstandPushups/v_HandStandPushups_g01_c01.avi",
            "Hammering/v_Hammering_g01_c01.avi",
            "Hammering/v_Hammering_g09_c01.avi",
        ),
        media=("HandstandPushups/v_HandstandPushups_g01_c01.avi", "UCF-101/Hammering/v_Hammering_g01_c01.avi"),
        labels=((36,), (34,)),
    ),
}
CLIP = ClipSpec(num_frames=2, crop_size=32, mel_rows=32, num_mel_bins=128)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", size=(64, 64), sound=Sound())


@pytest.mark.parametrize("dataset", FORMS)
def test_a_published_dataset_becomes_shards_and_batches(dataset: str, clip: Path, tmp_path: Path) -> None:
    form = FORMS[dataset]
    for name in form.media:
        (tmp_path / "media" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, tmp_path / "media" / name)
    request = DatasetRequest(
        annotations=write_lines(tmp_path / form.file, form.lines, line_end="\r\n"),
        media=tmp_path / "media",
        split="validation",
        max_missing=RejectBudget.parse("34%"),
    )
    source = read_dataset(dataset, request)
    out = tmp_path / "shards"
    report = convert(source, out, ConversionConfig(workers=1, audio_policy="required"))
    assert (report.num_samples, report.rejected) == (2, {})
    assert report.notes[MISSING_MEDIA] == 1
    (missing,) = (out / "missing.jsonl").read_text().splitlines()
    assert json.loads(missing) == {"sample": source.notes[MISSING_MEDIA][0]}
    assert verify_shard_set(out) == []
    assert read_shard_set(out).manifest.dataset == dataset
    (batch,) = read_batches(
        out,
        batch_size=2,
        clip=CLIP,
        sampling=SamplingConfig(scheme="uniform"),
        views=EvaluationViews(),
        loader=LoaderConfig(),
    )
    assert tuple(map(tuple, batch.labels.tolist())) == form.labels
    assert batch.has_audio.tolist() == [True, True]
    assert batch.video.shape == (2, 3, 2, 32, 32)
