import pytest


@pytest.fixture(autouse=True)
def _messages_as_written(messages_as_written):
    """Of all tests here."""
