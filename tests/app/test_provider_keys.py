"""The provider's keys are fetched seldom, by one for all, and those last seen outlive an outage."""

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from app.jwks import parse_keys
from app.provider_keys import BURST, MAX_BYTES, KeysUnavailable, ProviderKeys, from_file, from_url
from pglifeguard.embedded.waiting import eventually
from tests.provider import Provider, identity_provider, make_key, public_jwk

PARSE = partial(parse_keys, algorithms=("RS256", "ES256"))
OUTAGE = "the identity provider's keys cannot be fetched"


@pytest.fixture
def provider() -> Iterator[Provider]:
    """Give a provider over HTTP."""
    with identity_provider() as running:
        yield running


class Watched(ProviderKeys):
    """The keys of a provider, which count how their fetches went."""

    def __init__(self, provider: Provider, *, refresh: float = 60, pause: float = 60, timeout: float = 2) -> None:
        self.outcomes: Counter[str] = Counter()
        super().__init__(
            from_url(provider.jwks_url, timeout_seconds=timeout),
            PARSE,
            refresh_seconds=refresh,
            count=self.count,
            pause_seconds=pause,
        )

    def count(self, outcome: str) -> None:
        """Count one fetch."""
        self.outcomes[outcome] += 1

    async def fetched(self, times: int, outcome: str = "ok") -> bool:
        """Wait until so many fetches have gone so."""

        async def done() -> bool:
            return self.outcomes[outcome] >= times

        return await eventually(done, 10)


async def test_invented_names_cost_the_provider_little(provider: Provider) -> None:
    """A hundred tokens at once wait for one fetch; a thousand, one after the other, have no more than five made."""
    keys = Watched(provider)

    await asyncio.gather(*(keys.refresh() for _ in range(100)))
    at_once = provider.asked
    for _ in range(1000):
        await keys.refresh()

    assert (at_once, provider.asked) == (1, BURST)
    assert keys.find("one", "RS256") is not None


async def test_after_a_flood_new_keys_are_noticed_again(provider: Provider) -> None:
    """The allowance comes back with time, a fetch in each pause."""
    keys = Watched(provider, pause=0.05)
    for _ in range(BURST + 1):
        await keys.refresh()
    provider.rotate("two")

    async def found() -> bool:
        await keys.refresh()
        return keys.find("two", "RS256") is not None

    assert await eventually(found, 5)


async def test_new_key_is_found_after_the_pause(provider: Provider) -> None:
    """A token that names a new key has it fetched; the withdrawn key is gone with it."""
    keys = Watched(provider, pause=0.0001)
    await keys.refresh()
    provider.rotate("two", "ES256")

    before = keys.find("two", "ES256")
    await keys.refresh()

    assert before is None
    assert keys.find("two", "ES256") is not None
    assert keys.find("one", "RS256") is None


async def test_keys_are_fetched_again_and_again(provider: Provider) -> None:
    """A withdrawn key is forgotten without a token that asks."""
    keys = Watched(provider, refresh=0.01)
    async with keys.kept_fresh():
        assert await keys.fetched(1)
        provider.rotate("two")
        assert await keys.fetched(keys.outcomes["ok"] + 2)

        assert keys.find("one", "RS256") is None
        assert keys.find("two", "RS256") is not None


@pytest.mark.parametrize("trouble", ["error", "redirect", "page", "empty", "hangs", "long"])
async def test_outage_is_survived_and_told_once(
    provider: Provider, caplog: pytest.LogCaptureFixture, trouble: str
) -> None:
    """The keys last seen stay; the log has a line when it begins and one when it ends, however many fetches fail."""
    caplog.set_level(logging.INFO, "app.provider_keys")
    keys = Watched(provider, pause=0.0001, timeout=0.5)
    await keys.refresh()
    published = provider.published
    match trouble:
        case "error":
            provider.status = 500
        case "redirect":
            provider.status = 302
        case "page":
            provider.published = b"<html>Be right back</html>"
        case "empty":
            provider.published = b'{"keys": []}'
        case "hangs":
            provider.answering.clear()
        case _:
            provider.published += b" " * MAX_BYTES

    for _ in range(3):
        with pytest.raises(KeysUnavailable):
            await keys.refresh()
    kept = keys.find("one", "RS256")
    provider.status, provider.published = 200, published
    provider.answering.set()
    await keys.refresh()

    lines = [record.getMessage() for record in caplog.records if record.name == "app.provider_keys"]
    assert kept is not None
    assert keys.outcomes == {"ok": 2, "failed": 3}
    assert lines == [
        "the identity provider has new keys",
        f"{OUTAGE}; those last seen stay",
        "the identity provider's keys can be fetched again",
    ]


async def test_provider_that_is_away_is_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    """Nobody is there when the service starts: it goes on asking, and has the keys when they are there."""
    with identity_provider() as before:
        port = int(before.issuer.rpartition(":")[2])
    keys = Watched(before, pause=0.01)

    async with keys.kept_fresh():
        assert await keys.fetched(2, "failed")
        missing = keys.find("one", "RS256")
        with identity_provider(port):
            assert await keys.fetched(1)

            assert missing is None
            assert keys.find("one", "RS256") is not None
    assert f"{OUTAGE}; none yet" in caplog.text


@pytest.mark.parametrize(
    "url", ["http://\u2028.example/keys", f"http://{'x' * 300}.example/keys", "http://xn--\u0660.example/"]
)
async def test_name_that_nobody_can_resolve_is_an_outage(url: str) -> None:
    """What no check of the settings has found is told as an outage, and ends no task."""
    keys = ProviderKeys(from_url(url, timeout_seconds=5), PARSE, refresh_seconds=60, count=lambda _: None)

    with pytest.raises(KeysUnavailable):
        await keys.refresh()


async def test_fetch_outlives_the_request_that_began_it(provider: Provider) -> None:
    """A client that leaves takes nobody else's keys away."""
    provider.answering.clear()
    keys = Watched(provider)
    first, second = asyncio.create_task(keys.refresh()), asyncio.create_task(keys.refresh())

    async def asked() -> bool:
        return provider.asked == 1

    assert await eventually(asked, 5)
    first.cancel()
    with suppress(asyncio.CancelledError):
        await first
    provider.answering.set()
    await second

    assert provider.asked == 1
    assert keys.find("one", "RS256") is not None


async def test_end_waits_for_no_answer(provider: Provider) -> None:
    """A fetch that is under way is given up when the service ends."""
    provider.answering.clear()
    keys = Watched(provider, timeout=60)

    async with asyncio.timeout(5), keys.kept_fresh():

        async def asked() -> bool:
            return provider.asked == 1

        assert await eventually(asked, 5)

    assert keys.outcomes == {}


async def test_file_is_read_again(tmp_path: Path) -> None:
    """What is mounted is replaced while the service runs, and for a moment it may be away."""
    path = tmp_path / "keys.json"
    outcomes: Counter[str] = Counter()
    keys = ProviderKeys(
        from_file(path), PARSE, refresh_seconds=60, count=lambda outcome: outcomes.update([outcome]), pause_seconds=60
    )
    path.write_text(json.dumps({"keys": [public_jwk(make_key("RS256"), kid="one")]}), encoding="utf-8")
    await keys.refresh()
    path.unlink()
    with pytest.raises(KeysUnavailable):
        await keys.refresh()
    kept = keys.find("one", "RS256")
    path.write_text(json.dumps({"keys": [public_jwk(make_key("ES256"), kid="two")]}), encoding="utf-8")
    await keys.refresh()

    assert kept is not None
    assert (keys.find("one", "RS256"), keys.find("two", "ES256") is None) == (None, False)
    assert outcomes == {"ok": 2, "failed": 1}
