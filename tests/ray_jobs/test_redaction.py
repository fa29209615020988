"""Passwords and tokens reach no file, log or store."""

import io
from dataclasses import replace
from pathlib import Path

import pytest

from ca2st.errors import UserInputError
from ca2st.training.documents import flatten
from ray_jobs.config.recipe import Recipe, recipe_document
from ray_jobs.config.recipe_file import load_recipe
from ray_jobs.errors import RecipeError
from ray_jobs.redaction import (
    HIDDEN,
    RedactedStream,
    names_a_secret,
    redacted,
    redacted_values,
    refuse_credentials,
    without_credentials,
)
from ray_jobs.tracking.client import whole_uri

SECRET = "hunter2"
LEAKS = [
    f"https://me:{SECRET}@mlflow.example.org/api failed",
    f"https://{SECRET}@example.org/x",
    f"https://me:p@{SECRET}@example.org/x",
    f"{{'uri': 'https://me:'{SECRET}@example.org/x'}}",
    f"postgresql+psycopg://me:{SECRET}@db:5432/mlflow",
    f"s3://KEY:{SECRET}@bucket/shards",
    f"https://bucket.example.org/a.tar?X-Amz-Credential=x&X-Amz-Signature={SECRET}&b=1",
    f"https://example.org/a?token={SECRET}",
    f"https://example.org/a?AWSAccessKeyId={SECRET}",
    f"header Authorization: Bearer {SECRET}",
    f"{{'authorization': 'Basic {SECRET}'}}",
]


@pytest.mark.parametrize("text", LEAKS)
def test_k8_passwords_and_tokens_in_a_text_are_hidden(text: str) -> None:
    assert SECRET not in redacted(text)
    assert HIDDEN in redacted(text)
    assert redacted(redacted(text)) == redacted(text)


@pytest.mark.parametrize("text", LEAKS)
def test_k8_a_stream_hides_secrets_however_its_text_is_cut(text: str) -> None:
    kept = io.StringIO()
    with RedactedStream(kept) as stream:
        for letter in f"before\n{text}\nafter\n{text}":
            stream.write(letter)
            stream.flush()
        assert kept.getvalue() == f"before\n{redacted(text)}\nafter\n"
    assert kept.getvalue() == f"before\n{redacted(text)}\nafter\n{redacted(text)}"


@pytest.mark.parametrize(
    "text",
    [
        "sqlite:////runs & more/mlflow.db",
        "hf-hub:ORG/NAME@main",
        "/data/me@work/shards",
        "s3://bucket/folder",
        "http://127.0.0.1:5000/path?page_token_count=3",
        "a token of thanks",
        "p0?",
    ],
)
def test_k8_what_holds_no_secret_stays_as_it_is(text: str) -> None:
    assert redacted(text) == text
    assert without_credentials(text) == text


@pytest.mark.parametrize("name", ["password", "tracking.token", "aws_secret_access_key", "API-Key", "Authorization"])
def test_k8_values_with_the_name_of_a_secret_are_hidden(name: str) -> None:
    assert redacted_values({name: SECRET, "optim.base_lr": "0.1"}) == {name: HIDDEN, "optim.base_lr": "0.1"}


def test_k8_no_setting_of_a_recipe_is_taken_for_a_secret() -> None:
    recipe = load_recipe("smoke", [])
    assert [name for name in flatten(recipe_document(recipe)) if names_a_secret(name)] == []


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        (f"tracking.uri='https://me:{SECRET}@host'", r"tracking\.uri: .*MLFLOW_TRACKING_USERNAME"),
        (f"data.train='s3://KEY:{SECRET}@bucket/shards'", r"data: train: .*secrets in the environment"),
        (f"data.validation='https://host/v?sig={SECRET}'", r"data: validation: .*secrets in the environment"),
        (f"experts.spatial='https://host/x?token={SECRET}'", r"experts\.spatial: .*~/\.netrc"),
    ],
)
def test_k8_a_recipe_with_a_credential_is_refused_without_showing_it(setting: str, match: str) -> None:
    with pytest.raises(RecipeError, match=match) as caught:
        load_recipe("smoke", [setting])
    assert SECRET not in str(caught.value)


def test_k8_a_recipe_made_in_python_is_refused_too() -> None:
    recipe: Recipe = load_recipe("smoke", [])
    with pytest.raises(ValueError, match="without credentials") as caught:
        replace(recipe, tracking=replace(recipe.tracking, uri=f"postgresql://me:{SECRET}@host/mlflow"))
    assert SECRET not in str(caught.value)


def test_k8_texts_deep_in_a_document_are_found() -> None:
    with pytest.raises(UserInputError, match=r"data\.mixture\.1\.shards: expected an address without credentials"):
        refuse_credentials({"data": {"mixture": [{"shards": "x"}, {"shards": f"s3://a:{SECRET}@b"}]}})


@pytest.mark.parametrize(
    ("whole", "kept"),
    [
        (f"postgresql://db/mlflow?user=me&password={SECRET}", "postgresql://db/mlflow?user=me"),
        (f"https://host/x?token={SECRET}", "https://host/x"),
        ("mysql://db/mlflow?charset=utf8&ssl=1", "mysql://db/mlflow?charset=utf8&ssl=1"),
        ("sqlite:////runs/mlflow.db?timeout=5", "sqlite:////runs/mlflow.db?timeout=5"),
    ],
)
def test_k8_an_address_is_kept_without_a_password_among_its_options(
    whole: str, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert without_credentials(whole) == kept
    monkeypatch.setenv("MLFLOW_TRACKING_URI", whole)
    assert whole_uri(kept, tmp_path) == whole


def test_k8_an_address_is_kept_without_its_password_and_completed_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = f"https://me:{SECRET}@mlflow.example.org/base"
    kept = without_credentials(whole)
    assert kept == "https://mlflow.example.org/base"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", whole)
    assert whole_uri(kept, tmp_path) == whole
    assert whole_uri("https://elsewhere.example.org", tmp_path) == "https://elsewhere.example.org"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert whole_uri(kept, tmp_path) == kept
