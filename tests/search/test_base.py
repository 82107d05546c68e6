"""Secrets in addresses: shown nowhere, and refused where Ray would log them."""

from __future__ import annotations

import pytest

from search.base import SearchError, first_line, masked, one_line
from search.service.submit import check_secrets

SECRETS = (
    "postgresql://ada:S3cret@db/studies",
    "postgresql://ada:S3cret/more@db/studies",
    "postgresql://ada:S3cret and more@db/studies",
    "postgresql://ada:more S3cret@db:5432/studies",
    "postgresql://ada:more:S3cret@db/studies",
    "postgresql://ada:more@S3cret@db/studies",
    "postgresql://ada:S3cret?more#x@db/studies",
    "postgresql://:S3cret@db/studies",
    "postgresql://ada:S3cret@[::1]:5432/studies",
    "postgresql+psycopg2://ADA:S3cret@db/studies",
    "http://S3cret@mlflow:5000",
    "https://S3cret:@mlflow",
    "https://x-access-token:S3cret@mlflow/api",
    "postgresql://0123456789abcdefghS3cret@db/studies",
    "postgresql://db/studies?password=S3cret",
    "postgresql://db/studies?sslmode=verify-full&sslpassword=S3cret",
    "http://mlflow:5000?api_key=S3cret",
    "http://mlflow:5000/?access_token=S3cret&x=1",
    "http://mlflow:5000/?X-Api-Key=S3cret",
    "http://mlflow:5000/?TOKEN=S3cret",
    "mssql+pyodbc://db/studies?driver=x;PWD=S3cret",
    "mssql+pyodbc://db/studies?driver=x;Pwd={S3cret;more}",
    "mssql+pyodbc:///?odbc_connect=DRIVER%3Dx%3BPWD%3DS3cret%3BUID%3Dada",
    "mysql://db/studies?passwd=S3cret more",
    "mysql://db/studies?client_secret=S3cret&AccountKey=S3cret==",
    "postgresql://ada:'S3cret'@db/studies",
    "postgresql://ada:it's\"S3cret@db/studies",
    "http://mlflow:5000/#token=S3cret",
    "http://mlflow:5000/?Authorization=S3cret",
    "http://mlflow:5000/?x=1&bearer=S3cret",
    "ada:S3cret@127.0.0.1:6379",
    "ada:S3cret/more@head.internal:6379",
)

PLAIN = (
    "sqlite:///paredown.db",
    "sqlite:////data/a b/it's @ home:1/paredown.db",
    "paredown.studies",
    "/data/ada@home/paredown.studies",
    "postgresql://ada@db/studies",
    "postgresql://ada@db:5432/studies?sslmode=require&connect_timeout=5",
    "http://mlflow:5000",
    "http://mlflow:5000/path?workspace=tokens",
    "https://mlflow.example.org/api/@me",
    "127.0.0.1:6379",
    "[::1]:6379",
    "ada@head.internal:6379",
    "models:/digits@edge",
    "registry/image:1.2@sha256:0123456789",
)


@pytest.mark.parametrize("address", SECRETS)
def test_a_secret_in_an_address_is_shown_nowhere(address: str) -> None:
    for text in (
        address,
        f"cannot use the MLflow store {address}; expected a store",
        f"tracking: {{uri: '{address}'}}\n# ada@example.org\n",
        f"{address} and http://mlflow:5000 of ada@example.org",
    ):
        hidden = masked(text)
        assert "S3cret" not in hidden
        assert "***" in hidden
        assert masked(hidden) == hidden
    with pytest.raises(SearchError, match="Ray would log its password") as caught:
        check_secrets("sqlite:///paredown.db", address)
    assert "S3cret" not in str(caught.value)


@pytest.mark.parametrize("address", PLAIN)
def test_an_address_without_a_secret_is_shown_whole(address: str) -> None:
    assert masked(address) == address
    check_secrets(address, address)


def test_what_is_cut_shows_no_half_of_a_secret() -> None:
    for length in range(340, 400):
        error = ValueError(f"{'x' * length} postgresql://ada:S3cret and more@db/studies")
        assert "S3cret" not in one_line(error)
        assert "S3cret" not in first_line(error)


def test_the_words_around_an_address_stay() -> None:
    text = "the head is http://10.0.0.1:8265, and the nodes have CPU: 2; write to ada@example.org"
    assert masked(text) == text
    text = '{"uri": "http://10.0.0.1:8265","by":"ada@example.org", "at": \'http://10.0.0.1\'}'
    assert masked(text) == text
