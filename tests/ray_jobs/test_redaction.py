"""Passwords and tokens reach no file, log or store."""

import ast
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ca2st.errors import UserInputError
from ca2st.training.journal import flatten
from ray_jobs import redaction
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
_SECRET_WORDS = r"(?i)passw|pwd|passphrase|passcode|pass\b|auth\b|secret|token|credential|authori|signature|sig\b|key|jwt|cookie|bearer|://"
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
    f"postgresql://db/mlflow?user=me&pwd={SECRET}",
    f"postgresql://db/mlflow?user=me&sslpassword={SECRET}",
    f"https://example.org/back#access_token={SECRET}&expires=1",
    f"https://example.org/back?a=1#b=2&id_token={SECRET}",
    f"https://example.org/a?accessToken={SECRET}&clientSecret={SECRET};sig={SECRET}",
    f"Authorization: token {SECRET}",
    f"authorization: {SECRET}",
    f"Proxy-Authorization: Basic {SECRET}",
    f'Authorization: Digest username="me", nonce="{SECRET}", response="{SECRET}"',
    f"Authorization: AWS4-HMAC-SHA256 Credential={SECRET}/eu/s3, SignedHeaders=host, Signature={SECRET}",
    f"X-Api-Key: {SECRET}",
    f"X-Auth-Token: {SECRET}",
    f"Set-Cookie: session={SECRET}; Path=/",
    f"curl --oauth2-bearer {SECRET}",
    f"MLFLOW_TRACKING_PASSWORD={SECRET} ca2st train",
    f"export HF_TOKEN='{SECRET} and {SECRET}'",
    f"AWS_SECRET_ACCESS_KEY={SECRET}&{SECRET}",
    f"DB_PASSWORD={SECRET}'{SECRET}",
    f"host=db user=me password={SECRET} dbname=x",
    f'password = "{SECRET}"',
    f"mysql --password {SECRET} --user me",
    f"login --token={SECRET}",
    f'{{"user": "me", "password": "{SECRET}", "port": 1}}',
    f'{{"db_password":"a\\"{SECRET}"}}',
    f'{{"error": "{{\\"api_key\\": \\"a \\\\\\"{SECRET}\\"}}"}}',
    f"{{'auth_token': b'{SECRET}', 'x': 1}}",
    f'{{"password": "{SECRET}',
    '{"pass": 7654321}'.replace("7654321", f"7{SECRET}"),
    f"password: {SECRET}",
    f"hf_{SECRET}{SECRET}",
    f"ghp_{SECRET * 5}",
    f"github_pat_{SECRET}_{SECRET * 5}",
    f"key sk-proj-{SECRET * 5}",
    f"eyJ{SECRET * 2}.{SECRET * 2}.{SECRET}",
    f"-----BEGIN RSA PRIVATE KEY-----\n{SECRET}\n-----END RSA PRIVATE KEY-----".replace("\n", " "),
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
        "the bearer token is missing",
        "num_tokens=196 tokens: 5 max_token_count=3",
        "RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=/home/me/token",
        "password: expected a text, found None; token=None",
        '{"sample_ids_hash": "0123456789abcdef", "tokens": "x", "design": "y"}',
        "hf_hub_download, hf_transformers_weights and task-0123456789-0123456789",
        "https://example.org/page#section-token",
        "p0?",
    ],
)
def test_k8_what_holds_no_secret_stays_as_it_is(text: str) -> None:
    assert redacted(text) == text
    assert without_credentials(text) == text


_PLAIN = st.text(st.characters(exclude_characters="=:", exclude_categories=["Cs"]))
_SEPARATED = st.sampled_from(["?page=2&", "#top ", "x=1 ", "a: b ", '{"key": "v"} ', "--workers 3 ", "\n", " "])


@given(st.lists(_PLAIN | _SEPARATED).map("".join).filter(lambda text: re.search(_SECRET_WORDS, text) is None))
def test_k8_a_text_without_the_name_of_a_secret_stays_as_it_is(text: str) -> None:
    assert redacted(text) == text


@given(st.sampled_from(LEAKS), st.text(max_size=20), st.text(max_size=20))
def test_k8_a_secret_is_hidden_whatever_stands_around_it(leak: str, before: str, after: str) -> None:
    once = redacted(f"{before}\n{leak}\n{after}")
    assert SECRET not in once
    assert redacted(once) == once


def test_k8_no_message_of_ours_is_taken_for_a_secret() -> None:
    root = Path(redaction.__file__).parents[1]
    for path in [
        found for name in ("ca2st", "sharding", "pipelines", "ray_jobs") for found in (root / name).rglob("*.py")
    ]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and path.name != "redaction.py":
                assert redacted(node.value) == node.value, path


@given(st.recursive(st.text() | st.integers(), lambda inner: st.dictionaries(st.text(), inner)))
def test_k8_a_json_document_stays_one(document: object) -> None:
    for nested in ({"password": document, "x": document}, {"error": json.dumps({"a_token": document})}):
        json.loads(redacted(json.dumps(nested)))


@pytest.mark.parametrize(
    "name",
    [
        "password",
        "tracking.token",
        "aws_secret_access_key",
        "API-Key",
        "Authorization",
        "db.sslpassword",
        "clientSecret",
    ],
)
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
        (f"postgresql://db/x?pwd={SECRET}&a=1#access_token={SECRET}&b=2", "postgresql://db/x?a=1#b=2"),
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
