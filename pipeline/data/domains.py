"""What each held-out domain measures of a run: what it learns, or what it forgets."""

import os
from collections.abc import Iterable
from dataclasses import dataclass

from retemper.pipeline.data.streams import REPLAY, stream_paths
from retemper.pipeline.schema.run import Config


@dataclass(frozen=True)
class Domains:
    """The held-out domains of a run by what they measure."""

    learned: list[str]
    old: list[str]
    replayed: list[str]  # those of `old` whose corpus data.replay mixes in


def domains_of(config: Config, names: Iterable[str] | None = None) -> Domains:
    """Sort held-out domains into learned and old ones, by the config alone.

    A domain is learned where it belongs to a training stream other than data.replay: it has the
    stream's folder, or a folder of no stream and the stream's name. evals.learned overrides this.
    names: the domains, by default those of evals.heldout; another one is known by its name alone.
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
    """Describe on which domains a continued run will measure what it learns and what it forgets.

    A measure that it will not have is named together with the keys that would add it.
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
    """The training stream that a held-out domain belongs to."""
    streams = stream_paths(config)
    folder = config.evals.heldout.get(domain)
    of_folder = [name for name, path in streams.items() if folder and _same(path, folder)]
    if of_folder:
        # A corpus that is trained on under its own name is learned, whatever else replays it.
        return next((name for name in of_folder if name != REPLAY), REPLAY)
    return domain if domain in streams else None


def _same(one: str, other: str) -> bool:
    return _place(one) == _place(other)


def _place(path: str) -> str:
    return path.rstrip("/") if "://" in path else os.path.realpath(path)
