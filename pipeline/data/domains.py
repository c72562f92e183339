"""The held-out domains of a run, by what they measure: learning or forgetting."""

import os
from collections.abc import Iterable
from dataclasses import dataclass

from retemper.pipeline.data.streams import stream_paths
from retemper.pipeline.schema.data import REPLAY
from retemper.pipeline.schema.run import Config


@dataclass(frozen=True)
class Domains:
    """The held-out domains of a run: new ones measure learning, old ones forgetting."""

    learned: list[str]
    old: list[str]
    replayed: list[str]  # the subset of `old` whose corpus data.replay mixes in


def domains_of(config: Config, names: Iterable[str] | None = None) -> Domains:
    """Sort held-out domains into learned and old ones, by the config alone.

    A domain is learned if it belongs to a training stream other than data.replay: it has the
    stream's folder, or a folder of no stream and the stream's name. evals.learned overrides this.

    Args:
        config: the run's config.
        names: the domains, by default those of evals.heldout; others are matched by name alone.
    """
    streams = {domain: _stream_of(config, domain) for domain in names or config.evals.heldout}
    learned = config.evals.learned
    if learned is None:
        learned = [domain for domain, stream in streams.items() if stream not in (None, REPLAY)]
    old = [domain for domain in streams if domain not in learned]
    return Domains(
        [domain for domain in streams if domain in learned],
        old,
        [domain for domain in old if streams[domain] == REPLAY],
    )


def measures(config: Config) -> list[str]:
    """Describe on which domains a run measures what it learns and what it forgets.

    A missing measurement is described together with the keys that add it.
    """
    domains = domains_of(config)
    trained_on = [name for name in stream_paths(config) if name != REPLAY]
    lines = []
    if domains.learned:
        lines.append(f"what it learns is measured on held-out {', '.join(domains.learned)}")
    else:
        lines.append(
            "no learning will be measured: no domain of evals.heldout is of the text that it "
            f"trains on ({', '.join(trained_on)}). Set evals.heldout.{config.data.name}="
            f"{config.data.path}, or name such domains in evals.learned=[…]"
        )
    if domains.old:
        listed = [
            f"{name} (replayed)" if name in domains.replayed else name for name in domains.old
        ]
        lines.append(f"what it forgets is measured on held-out {', '.join(listed)}")
    else:
        lines.append(
            "no forgetting will be measured on held-out text: evals.heldout has no domain that it "
            "does not train on. Set evals.heldout.NAME=FOLDER to token shards of text that the "
            "base knew"
        )
    return lines


def _stream_of(config: Config, domain: str) -> str | None:
    """Return the training stream that a held-out domain belongs to, or None."""
    streams = stream_paths(config)
    folder = config.evals.heldout.get(domain)
    matches = [name for name, path in streams.items() if folder and _is_same_folder(path, folder)]
    if matches:
        # A corpus that is a training stream itself is learned, even if data.replay has it, too.
        return next((name for name in matches if name != REPLAY), REPLAY)
    return domain if domain in streams else None


def _is_same_folder(one: str, other: str) -> bool:
    return _resolved(one) == _resolved(other)


def _resolved(path: str) -> str:
    return path.rstrip("/") if "://" in path else os.path.realpath(path)
