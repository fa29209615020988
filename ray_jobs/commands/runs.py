"""Commands on finished runs: tests, predictions, features, attention, comparisons, and ``track sync``."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ca2st.durable import write_bytes
from ca2st.errors import EnvironmentFault, UserInputError, listed
from ray_jobs.commands.options import Json, OpenRay, RayAddress, TrackingStore, refuse_without_ray
from ray_jobs.console import answer, counted, parse_views, print_json, require_writable_place, result, say, table

if TYPE_CHECKING:
    from pipelines.views import EvaluationViews
    from ray_jobs.compare import Comparison
    from ray_jobs.evaluation.workers import Workers
    from ray_jobs.runs.prediction import PredictionReport
    from ray_jobs.runs.timeline import TimelineReport

Checkpoint = Annotated[Path, typer.Argument(help="A checkpoint folder, or a run folder for its newest one.")]
Which = Annotated[
    str, typer.Option("--checkpoint", help="Of a run folder: best (of validation), last, or the number of a step.")
]
ScoringWorkers = Annotated[
    int, typer.Option("--workers", help="Processes that score; one per GPU where there are GPUs.")
]
OnRay = Annotated[bool, typer.Option("--ray", help="Score in tasks of Ray.")]
_MOST_SHOWN_SETTINGS = 40
_LINE = "\n  "
_MOST_SHOWN_CHARACTERS = 32


def evaluate(
    checkpoints: Annotated[
        list[Path],
        typer.Argument(help="Checkpoint folders, or run folders for their newest one; one per --data, or one."),
    ],
    data: Annotated[list[str], typer.Option(help="Shards to test on: a folder or a URL; may be repeated.")],
    views: Annotated[str, typer.Option(help="Clips x crops per sample: 2x3 as published, Kinetics-400: 5x3.")] = "2x3",
    workers: ScoringWorkers = 1,
    ray: OnRay = False,
    ray_address: RayAddress = "local",
    open_ray: OpenRay = False,
    predictions: Annotated[
        Path | None, typer.Option(help="Parquet file for the predictions; default: in the run folder.")
    ] = None,
    submission: Annotated[
        str | None,
        typer.Option(help="Write a challenge's file: epic_kitchens_100, epic_sounds or something_something_v2."),
    ] = None,
    sls: Annotated[
        str | None,
        typer.Option(help="With --submission of EPIC: sls_pt,sls_tl,sls_td[,t_mod] by the challenge's rules."),
    ] = None,
    track: Annotated[bool, typer.Option("--track/--no-track", help="Results go to the run in MLflow.")] = True,
    which: Which = "last",
    as_json: Json = False,
) -> None:
    """Score every sample once: the mean over its views' softmax (several labels: sigmoid). Several runs: their means.

    Example: ca2st evaluate runs/smoke --data shards/validation --views 2x3
    """
    from ray_jobs.evaluation.submissions import check_model_fits, parse_supervision, write_beside
    from ray_jobs.evaluation.workers import evaluate_checkpoint, facts_of, log_to_run, means_of, scoring_ray
    from ray_jobs.runs.model import find_checkpoint, run_document_of

    who = _scorers(workers, ray=ray, ray_address=ray_address, open_ray=open_ray)
    pairs = _pairs(checkpoints, data, alone={"--predictions": predictions, "--submission": submission})
    if sls is not None and submission is None:
        raise UserInputError("--sls: expected --submission beside it, whose file it goes into")
    supervision = None if submission is None else parse_supervision(sls, submission=submission)
    reports = []
    cut = _test_views(views)
    with scoring_ray(who):
        for run, place in pairs:
            checkpoint = find_checkpoint(run, which)
            if submission is not None:
                check_model_fits(submission, run_document_of(checkpoint).classes)
            reports.append(evaluate_checkpoint(checkpoint, place, cut, predictions=predictions, workers=who))
    runs = [facts_of(report, views) for report in reports]
    facts: dict[str, object] = runs[0] if len(runs) == 1 else {"runs": runs, **means_of(reports)}
    if submission is not None:
        facts |= write_beside(submission, reports[0].predictions, supervision)
    means = [{name: facts[name] for name in ("mean", "harmonic_mean")}] if len(runs) > 1 else []
    lines = [
        table({name: value for name, value in one.items() if not isinstance(value, dict | list)})
        for one in [*runs, *means]
    ]
    answer(facts, lines, as_json=as_json)
    for report in reports if track else []:
        log_to_run(report)


def _scorers(workers: int, *, ray: bool, ray_address: str, open_ray: bool) -> "Workers":
    from ray_jobs.evaluation.workers import Workers

    refuse_without_ray(ray=ray, ray_address=ray_address, accept_open_ray=open_ray)
    return Workers(number=workers, ray_address=ray_address if ray else None, accept_open_ray=open_ray)


def _pairs(checkpoints: list[Path], data: list[str], *, alone: Mapping[str, object | None]) -> list[tuple[Path, str]]:
    """Return each checkpoint with its set: one with each set, each with the one set, or by their order."""
    if len(checkpoints) != len(data) and 1 not in (len(checkpoints), len(data)):
        raise UserInputError(
            f"expected one --data for all checkpoints or one for each, found {len(data)} for {len(checkpoints)}"
        )
    count = max(len(checkpoints), len(data))
    pairs = list(zip(checkpoints * (count // len(checkpoints)), data * (count // len(data)), strict=True))
    if len(pairs) > 1 and (given := [name for name, value in alone.items() if value is not None]):
        raise UserInputError(f"{given[0]}: expected one checkpoint and one --data beside it, found {len(pairs)} pairs")
    return pairs


def significance(
    first: Annotated[Path, typer.Argument(help="Predictions of `ca2st evaluate`, Parquet.")],
    second: Annotated[Path, typer.Argument(help="Those of another model on the same set.")],
    draws: Annotated[int, typer.Option(help="Bootstrap draws.")] = 10_000,
    confidence: Annotated[float, typer.Option(help="Of the interval.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    as_json: Json = False,
) -> None:
    """Compare two models on the same samples: McNemar's exact test, and a bootstrap interval of the difference.

    Example: ca2st significance runs/a/predictions.parquet runs/b/predictions.parquet
    """
    from ray_jobs.evaluation.significance import compare_predictions

    found = compare_predictions(first, second, draws=draws, confidence=confidence, seed=seed)
    lines = []
    for one in found:
        lines += [
            f"{one.metric}: {one.first:.2%} and {one.second:.2%} of {one.num_samples} samples, difference "
            f"{100 * one.difference:+.2f} points ({confidence:.0%} interval {100 * one.low:+.2f} to "
            f"{100 * one.high:+.2f})",
            f"  only the first right {one.only_first}, only the second {one.only_second}; McNemar's exact test: "
            f"p = {one.p_value:.3g}",
        ]
    answer({"first": str(first), "second": str(second), "comparisons": found}, lines, as_json=as_json)


def robustness(
    checkpoint: Checkpoint,
    data: Annotated[str, typer.Option(help="Shards to test on: a folder or a URL.")],
    views: Annotated[str, typer.Option(help="Clips x crops per sample.")] = "2x3",
    conditions: Annotated[
        str | None, typer.Option(help="Some of them, such as white_noise,time_shift; default: all.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn: noise, shifts, places.")] = 0,
    workers: ScoringWorkers = 1,
    ray: OnRay = False,
    ray_address: RayAddress = "local",
    open_ray: OpenRay = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for report, plot and predictions; default: in the run.")
    ] = None,
    which: Which = "last",
    as_json: Json = False,
) -> None:
    """Test a model that hears with its sound disturbed: noise, shifts, missing or masked sound; with a plot.

    Example: ca2st robustness runs/smoke --data shards/validation --views 1x1
    """
    from ray_jobs.evaluation.perturbations import PERTURBATIONS
    from ray_jobs.evaluation.robustness import PLOT_NAME, measure_robustness
    from ray_jobs.runs.model import find_checkpoint

    chosen = tuple(PERTURBATIONS) if conditions is None else tuple(name.strip() for name in conditions.split(","))
    report, folder = measure_robustness(
        find_checkpoint(checkpoint, which),
        data,
        _test_views(views),
        conditions=chosen,
        seed=seed,
        out=out,
        workers=_scorers(workers, ray=ray, ray_address=ray_address, open_ray=open_ray),
    )
    lines = [
        f"undisturbed: {report.main_metric} {report.clean[report.main_metric]:.2%} of {report.num_samples} samples",
        *(
            f"{one.says}: {one.against_clean.second:.2%}, {100 * one.against_clean.difference:+.2f} points (95% "
            f"interval {100 * one.against_clean.low:+.2f} to {100 * one.against_clean.high:+.2f})"
            for one in report.conditions
        ),
        f"plot: {folder / PLOT_NAME}",
    ]
    answer({**asdict(report), "plot": str(folder / PLOT_NAME)}, lines, as_json=as_json)


def predict(
    checkpoint: Checkpoint,
    videos: Annotated[
        list[Path],
        typer.Argument(
            help="Video files (MP4, MKV, WebM, AVI, MPEG, FLV, Ogg, ASF), folders, or patterns: 'clips/**/*.mp4'."
        ),
    ],
    top: Annotated[int, typer.Option(min=1, help="How many classes per video.")] = 5,
    views: Annotated[str, typer.Option(help="Clips x crops per video, or per window.")] = "2x3",
    which: Which = "last",
    window: Annotated[
        float | None, typer.Option(help="Seconds of a window: videos of any length, a row per window.")
    ] = None,
    stride: Annotated[float | None, typer.Option(help="Seconds from window to window; default: half a window.")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="With --window: probability from which a class is an event; default: 0.5.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="With --window: folder for rows (CSV), events (JSON) and timeline (SVG).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Classify video files with a trained model; ends with 3 when some cannot be read, and names them.

    Example: ca2st predict runs/smoke holiday.mp4 --top 3, or: ca2st predict runs/smoke film.mp4 --window 2 --stride 1
    """
    from ray_jobs.runs.model import find_checkpoint
    from ray_jobs.runs.prediction import find_videos, predict_readable
    from ray_jobs.runs.timeline import LEAST_STRIDE_SECONDS, WindowConfig, predict_timeline

    files, aside = find_videos(videos)
    if aside:
        say(f"left aside, no videos by their endings: {listed(aside)}")
    checkpoint = find_checkpoint(checkpoint, which)
    if window is not None:
        step = max(window / 2, LEAST_STRIDE_SECONDS) if stride is None else stride
        least = 0.5 if threshold is None else threshold
        cut = WindowConfig(window_seconds=window, stride_seconds=step, threshold=least, top=top)
        found = predict_timeline(checkpoint, files, cut, views=_test_views(views), out=out or Path("timelines"))
        _show_timelines(found, as_json=as_json)
        return
    if stride is not None or out is not None or threshold is not None:
        raise UserInputError(
            "--stride, --threshold, --out: expected --window beside them; for example --window 2 --stride 1"
        )
    report = predict_readable(checkpoint, files, top=top, views=_test_views(views))
    _show_predictions(report, as_json=as_json)
    if report.damaged:
        say(f"{len(report.videos)} of {len(files)} videos predicted, {len(report.damaged)} cannot be read")
        raise typer.Exit(3)


def _show_predictions(report: "PredictionReport", *, as_json: bool) -> None:
    lines = []
    for video in report.videos:
        lines.append(video.video)
        lines += [f"  {one.probability:6.1%}  {one.target}: {one.label}" for one in video.predictions]
    answer(report, lines, as_json=as_json)
    if report.notes:
        say(f"notes: {counted(report.notes)}")
    for damaged in report.damaged:
        say(f"cannot be read: {damaged.video}: {damaged.reason} ({damaged.what})")
    if any(damaged.reason == "too_large" for damaged in report.damaged):
        say("videos of any length are read in windows: add --window 2 --stride 1")


def _show_timelines(found: Sequence["TimelineReport"], *, as_json: bool) -> None:
    from ray_jobs.runs.timeline import clock

    if as_json:
        print_json({"videos": found})
    for report in found:
        if not as_json:
            result(report.video)
        for event in () if as_json else report.events:
            span = f"{clock(event.start_seconds):>9} - {clock(event.end_seconds):>9}"
            result(f"  {span}  {event.probability:6.1%}  {event.target}: {event.label}")
        say(f"{report.video}: {report.num_windows} windows to {clock(report.seconds)}, {len(report.events)} events")
        say(f"  {report.windows}, {report.document}, {report.timeline}")
        for damaged in report.damaged:
            say(f"cannot be read: {damaged.video}: {damaged.reason} ({damaged.what})")
    if any(report.damaged or not report.num_windows for report in found):
        raise typer.Exit(3)


def features(
    checkpoint: Checkpoint,
    data: Annotated[
        str, typer.Option(help="Shards to read, a folder or a URL; their classes need not be the model's.")
    ],
    views: Annotated[str, typer.Option(help="Clips x crops per sample; a feature is the mean over them.")] = "1x1",
    experts: Annotated[
        str | None, typer.Option(help="Experts to write, such as spatial,audio; default: all the model has.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Parquet file; default: in the run folder.")] = None,
    as_json: Json = False,
) -> None:
    """Write the pooled feature of every expert, as it goes into the head, for every sample of a shard set.

    Example: ca2st features runs/smoke --data shards/validation --views 2x3 --experts spatial,audio
    """
    from ray_jobs.runs.inference import write_features

    report = write_features(
        checkpoint,
        data,
        _test_views(views),
        experts=None if experts is None else tuple(name.strip() for name in experts.split(",")),
        out=out,
    )
    facts = {"features": str(report.features), "num_samples": report.num_samples, "experts": report.experts}
    answer(facts, [table(facts)], as_json=as_json)


def explain(
    checkpoint: Checkpoint,
    video: Annotated[Path, typer.Argument(help="A video file (MP4, MKV, WebM, AVI, MPEG, FLV, Ogg, ASF).")],
    out: Annotated[Path | None, typer.Option(help="HTML page; default: VIDEO's name with .explain.html, here.")] = None,
    as_json: Json = False,
) -> None:
    """Show what each expert listened to in a video: cross-attention by direction and layer, as one HTML page.

    Example: ca2st explain runs/smoke holiday.mp4 --out holiday.html
    """
    from ray_jobs.explain.page import explain_video

    report = explain_video(checkpoint, video, out=out)
    facts = {"html": str(report.html), "predictions": report.predictions, "entropy": report.entropy}
    lines = [f"  {one.probability:6.1%}  {one.target}: {one.label}" for one in report.predictions]
    answer(facts, [*lines, table({"page": report.html})], as_json=as_json)


def compare(
    runs: Annotated[list[str] | None, typer.Argument(help="Names of runs or beginnings of ids; default: all.")] = None,
    experiment: Annotated[str | None, typer.Option(help="MLflow experiment; default: all.")] = None,
    recipe: Annotated[list[str] | None, typer.Option(help="Only runs of this recipe; may be repeated.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Only runs with this tag, name=value; may be repeated.")] = None,
    baseline: Annotated[str | None, typer.Option(help="Run that differences refer to; default: the first.")] = None,
    newest: Annotated[int, typer.Option(help="At most so many runs, the newest.")] = 20,
    tracking_uri: TrackingStore = None,
    html: Annotated[Path | None, typer.Option(help="Write the comparison as one HTML file.")] = None,
    as_json: Json = False,
) -> None:
    """MLflow runs side by side: settings that differ, last and best accuracy with their steps, curves, device time.

    Example: ca2st compare --experiment ca2st --html compare.html
    """
    from ray_jobs import compare as comparing
    from ray_jobs.environment import default_tracking_uri
    from ray_jobs.redaction import without_credentials

    require_writable_place(html, "--html")
    if wrong := [one for one in tag or () if "=" not in one]:
        raise UserInputError(f"--tag: expected name=value, found {wrong[0]!r}")
    tags = dict(one.split("=", 1) for one in tag or ())
    uri = tracking_uri or default_tracking_uri(Path("runs"))
    wanted = comparing.RunFilter(
        experiment=experiment, recipes=tuple(recipe or ()), tags=tags, runs=tuple(runs or ()), newest=newest
    )
    comparison = comparing.compare(comparing.read_runs(uri, wanted), baseline=baseline)
    if html is not None:
        page = comparing.render_comparison_page(comparison, source=without_credentials(uri))
        write_bytes(html, page.encode())
        say(f"wrote {html}")
    answer(comparison, _lines(comparison), as_json=as_json)


def _lines(comparison: "Comparison") -> list[str]:
    from ray_jobs.pages.charts import duration_in_words

    width = max(len(run.label) for run in comparison.runs)
    lines = [
        f"{'run':<{width}}  {'id':<8}  {'status':<8}  {'last':>6} {'step':>7}  {'best':>6} {'step':>7}  {'delta':>6}  "
        f"{'device time':>16}  {'clips/s':>8}"
    ]
    for run in comparison.runs:
        values = (run.accuracy, run.last_step), (run.best, run.best_step)
        last, best = (("-", "-") if value is None else (f"{value:.1%}", step) for value, step in values)
        delta = run.deltas.get(run.accuracy_name or "")
        shown = "base" if run.run_id == comparison.baseline else "-" if delta is None else f"{100 * delta:+.1f}"
        spent = "-" if run.device_hours is None else f"{duration_in_words(3600 * run.device_hours)} {run.device}"
        speed = run.metrics.get("train/clips_per_second")
        lines.append(
            f"{run.label:<{width}}  {run.run_id[:8]}  {run.status.lower():<8}  {last[0]:>6} {last[1]!s:>7}  "
            f"{best[0]:>6} {best[1]!s:>7}  {shown:>6}  {spent:>16}  {'-' if speed is None else format(speed, '.0f'):>8}"
        )
    for one in comparison.across_datasets:
        sets = ", ".join(f"{name} {accuracy:.1%}" for name, accuracy in one.accuracies.items())
        lines.append(f"{one.model} over {sets}: harmonic mean {one.harmonic_mean:.1%}")
    lines.append(f"\n{len(comparison.settings)} settings differ, {comparison.num_equal_settings} are the same")
    settings = [f"{name}: {' | '.join(map(_short, values))}" for name, values in comparison.settings.items()]
    if len(settings) > _MOST_SHOWN_SETTINGS:
        lines.append("--html and --json show all of them; the first:")
    return [*lines, f"  {listed(settings, most=_MOST_SHOWN_SETTINGS, separator=_LINE)}"] if settings else lines


def _short(value: str | None) -> str:
    """Return the end of a long value: it says the most of a path."""
    if value is None:
        return "-"
    return value if len(value) <= _MOST_SHOWN_CHARACTERS else f"...{value[3 - _MOST_SHOWN_CHARACTERS :]}"


track = typer.Typer(no_args_is_help=True)


@track.callback()
def _group() -> None:
    """Keeps the verbs even while there is only one."""


@track.command(epilog="Example: ca2st track sync runs/smoke")
def sync(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a training run.")],
    as_json: Json = False,
) -> None:
    """Send what MLflow does not have yet of a run: its journal, system metrics, inputs, artefacts and model.

    Ends with 4 while something is lacking: the store cannot be reached, or did not take all.
    """
    from ray_jobs.tracking.sender import sync as send
    from ray_jobs.tracking.state import read_state

    sent = send(run_dir)
    state = read_state(run_dir)
    lacking = list(state.progress.pending)
    if state.run_id is None:
        told = f"{run_dir}: nothing to send yet, the journal has no line"
    else:
        still = f"; it still lacks {', '.join(lacking)}, for the reasons above" if lacking else ""
        told = f"{sent} values sent to MLflow run {state.run_id}{still}"
    answer({"sent": sent, "run_id": state.run_id, "lacking": lacking}, [told], as_json=as_json)
    if lacking:
        raise typer.Exit(EnvironmentFault.exit_code)


def _test_views(text: str) -> "EvaluationViews":
    from pipelines.views import EvaluationViews

    clips, crops = parse_views(text)
    return EvaluationViews(protocol="test", clips=clips, crops=crops)
