"""The prompt round: ask every client for its prompts, wait until a deadline, and go on listening for the late ones."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from logging import INFO, WARNING
from typing import Any

import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid

from fgl_app.errors import PromptError
from fgl_app.prompts import (
    MergedPrompts,
    NamedPrompt,
    PromptCount,
    PromptLimits,
    limit_shares,
    merge_prompts,
    require_senders,
    screen_prompts,
)
from fgl_app.records import (
    CONFIG,
    PROMPTS_MESSAGE,
    decode_prompts,
    defended_of,
    embeddings_of,
    label_prompts,
    num_unreadable_of,
    payload_of,
    place_of,
    serialized_bytes,
)
from strategies.refusals import Refusals, error_sentence, went_astray

_POLL_S = 0.5
_ASK_AGAIN_S = 5.0
_MOST_TIMES_ASKED = 4
_SAY_AFTER_S = 60.0
_SAY_AT_MOST_EVERY_S = 3600.0
_TTL_MARGIN_S = 3600.0
"""A question outlives the deadline by so much, so that a late client can still answer while images are drawn."""


class PromptRound:
    """Who was asked for prompts, whose have arrived, and what of them was refused.

    Args:
        grid: Access to the clients.
        limits: What is accepted of one client.
        class_names: The run's K classes; empty for the union of the clients' classes.
        domains: Names of the domains that prompts may have.
        embedding_shape: L and D of the generator's text encoder where prompts are names of embeddings; None for texts.
        max_client_share: Largest share of a class's images that one client's prompts may claim.
        uniform: Whether every prompt of a class gets the same number of images.
        min_senders: Least number of clients that must have sent a text.
        class_prompt: What takes the place of a text that fewer sent: the prompt of a class name and a domain.
        deadline_s: Seconds that :meth:`wait` waits.
        approved_by_owners: Whether every client waits for its owner's approval before it answers.
        exact_counts: Whether the counts of prompts are numbers of images.
        before_asking: Is called before any node is asked for the first time, for the second, and so on: each answer may
            draw new noise.
    """

    def __init__(
        self,
        grid: Grid,
        limits: PromptLimits,
        *,
        class_names: Sequence[str] = (),
        domains: Sequence[str] = (),
        embedding_shape: tuple[int, int] | None = None,
        max_client_share: float = 1.0,
        uniform: bool = False,
        min_senders: int = 1,
        class_prompt: Callable[[str, str], str] = lambda class_name, domain: class_name,
        deadline_s: float = 3600.0,
        approved_by_owners: bool = False,
        exact_counts: bool = True,
        before_asking: Callable[[], None] = lambda: None,
    ) -> None:
        """See the class."""
        self._grid = grid
        self._limits = limits
        self._class_names = tuple(class_names)
        self._domains = tuple(domains)
        self._embedding_shape = embedding_shape
        self._max_client_share = max_client_share
        self._uniform = uniform
        self._min_senders = min_senders
        self._class_prompt = class_prompt
        self._deadline_s = deadline_s
        self._approved_by_owners = approved_by_owners
        self._exact_counts = exact_counts
        self._before_asking = before_asking
        self._asked: Counter[int] = Counter()  # how many times each node was
        self._lost: set[int] = set()
        self._open: dict[str, int] = {}
        self._uploads: dict[int, list[NamedPrompt]] = {}
        self._embeddings: dict[str, torch.Tensor] = {}
        self._unreadable: dict[int, int] = {}
        self._defended: dict[int, tuple[int, int, int]] = {}
        self._replaced: list[PromptCount] = []
        self._cut: list[PromptCount] = []
        self._late: set[int] = set()
        self.refusals = Refusals()
        self.message_bytes: list[int] = []
        """Size of each usable reply, as Flower serializes it."""
        self.payload_bytes: list[int] = []
        """Size of the packed prompts and embeddings in each of them."""

    def ask(self, nodes: Iterable[int]) -> None:
        """Ask the nodes that were not asked before, and again, a few times, where question or answer went astray."""
        again = {node for node in self._lost if self._asked[node] < _MOST_TIMES_ASKED}
        for node in sorted(set(nodes) - (self._asked.keys() - again)):
            if self._asked[node] == max(self._asked.values(), default=0):
                self._before_asking()
            self._asked[node] += 1
            self._lost.discard(node)
            question = Message(
                content=RecordDict({CONFIG: ConfigRecord({"server-round": 1})}),
                message_type=PROMPTS_MESSAGE,
                dst_node_id=node,
                ttl=self._deadline_s + _TTL_MARGIN_S,
            )
            ids = [message_id for message_id in self._grid.push_messages([question]) if message_id]
            if ids:
                self._open[ids[0]] = node
            else:
                self.refusals.add(node, "It could not be asked.")

    def wait(self, least: int = 1) -> None:
        """Take in replies until all have come or the deadline is over; ask those who connect, or are back, meanwhile.

        Args:
            least: Where fewer have sent usable prompts, clients that are gone are waited for, too.
        """
        end = time.monotonic() + self._deadline_s
        ask_again = time.monotonic() + _ASK_AGAIN_S
        until = time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(time.time() + self._deadline_s)).strip()
        pause = _SAY_AFTER_S
        say_at = time.monotonic() + (0.0 if self._approved_by_owners else pause)
        while (self._take_in() or self._may_reach(least)) and time.monotonic() < end:
            time.sleep(min(_POLL_S, self._deadline_s))
            if time.monotonic() > ask_again:
                self.ask(self._grid.get_node_ids())
                ask_again = time.monotonic() + _ASK_AGAIN_S
            if time.monotonic() > say_at:
                self._say_who_is_waited_for(until)
                say_at, pause = time.monotonic() + pause, min(2 * pause, _SAY_AT_MOST_EVERY_S)
        log(INFO, "[ROUND 1] prompts of %s of %s clients", len(self._uploads), len(self._asked))
        if self._open:
            log(WARNING, "prompt round: %s clients did not reply in time", len(self._open))

    def _say_who_is_waited_for(self, until: str) -> None:
        told = f"prompt round: replies from {len(self._asked) - len(self._open)} of {len(self._asked)} clients so far"
        if self._approved_by_owners and self._open:
            log(INFO, "%s; waiting for the approval of %s sites' owners, until %s", told, len(self._open), until)
        else:
            log(INFO, "%s, until %s; sites may be waiting for their owner's approval", told, until)

    def listen(self, *, ask: bool = True) -> None:
        """Ask clients that connected meanwhile, or are back, unless it is too late, and take in late replies."""
        before = set(self._uploads)
        if ask:
            self.ask(self._grid.get_node_ids())
        self._take_in()
        late = set(self._uploads) - before
        self._late |= late
        if late:
            log(INFO, "prompt round: the prompts of %s late clients are merged", len(late))

    @property
    def num_used(self) -> int:
        """Clients whose prompts can be used."""
        return len(self._uploads)

    @property
    def num_asked(self) -> int:
        """Clients that were asked."""
        return len(self._asked)

    def merged(self) -> MergedPrompts:
        """Merge what has arrived so far (FGL, Section 3.3); the order of the replies does not matter.

        Raises:
            PromptError: If the clients together name fewer than two classes.
        """
        class_names = self._class_names or self._unite_classes()
        labelled = [label_prompts(named, class_names) for named in self._uploads.values()]
        limited = limit_shares(labelled, self._max_client_share, self._uniform)
        shown = require_senders(
            limited, self._min_senders, lambda label, domain: self._class_prompt(class_names[label], domain)
        )
        self._cut = [item for before, after in zip(labelled, limited, strict=True) for item in {*before} - {*after}]
        self._replaced = [
            item
            for before, after in zip(limited, shown, strict=True)
            for kept in [{(each.label, each.prompt, each.domain) for each in after}]
            for item in before
            if (item.label, item.prompt, item.domain) not in kept
        ]
        prompts = merge_prompts(shown)
        absent = len(class_names) - len({item.label for item in prompts})
        if absent:
            log(WARNING, "prompt round: no client sent a prompt of %s of %s classes", absent, len(class_names))
        used = {item.prompt for item in prompts}
        embeddings = {name: self._embeddings[name] for name in sorted(used & set(self._embeddings))}
        return MergedPrompts(tuple(prompts), class_names, embeddings)

    def _unite_classes(self) -> tuple[str, ...]:
        """Form the label space of the clients' class names; refuse uploads with which it would be too large.

        Those that name few classes are united first, so that one client's senseless names cost no other its place.
        """
        named = {node: {item.class_name for item in upload} for node, upload in self._uploads.items()}
        united: set[str] = set()
        for node in sorted(named, key=lambda node: (len(named[node]), sorted(named[node]), node)):
            if len(united | named[node]) > self._limits.max_classes:
                del self._uploads[node]
                self._refuse(node, "Refused: more classes than `max-classes` together with those of the others.")
            else:
                united |= named[node]
        if len(united) < 2:
            raise PromptError(f"The clients must hold at least 2 different classes, but hold {len(united)}.")
        holders = Counter(name for node in self._uploads for name in named[node])
        if alone := sum(count == 1 for count in holders.values()):
            log(
                WARNING,
                "prompt round: %s of %s classes come from one client alone; rounds without it teach nothing of them",
                alone,
                len(united),
            )
        return tuple(sorted(united))

    def report(self) -> dict[str, Any]:
        """Say for ``results.json`` who took part; clients are named by their partition id."""
        names, unreadable = self.refusals.name_of, self.refusals.names_of(self._unreadable)
        return {
            "clients_asked": len(self._asked),
            "clients_used": len(self._uploads),
            "late": sorted(names(node) for node in self._late),
            "missed": sorted(names(node) for node in self._open.values()),
            "unreadable_images": {unreadable[node]: count for node, count in sorted(self._unreadable.items())},
            "refused": self.refusals.rows(),
            "defences": self._what_defences_did(),
        }

    def _what_defences_did(self) -> dict[str, Any]:
        """Count for ``results.json`` what clients told of their captions, and what merging replaced or cut."""
        told = [self._defended[node] for node in self._uploads if node in self._defended]
        written, changed, emptied = (sum(counts) for counts in zip(*told, strict=True)) if told else (0, 0, 0)
        return {
            "captions": {"clients": len(told), "written": written, "changed": changed, "emptied": emptied}
            if told
            else None,
            "prompts_replaced": len(self._replaced),
            "images_replaced": sum(item.count for item in self._replaced) if self._exact_counts else None,
            "prompts_cut": len(self._cut),
        }

    def _may_reach(self, least: int) -> bool:
        """Return whether prompts are lacking that clients which are gone may yet send."""
        return len(self._uploads) < least and any(self._asked[node] < _MOST_TIMES_ASKED for node in self._lost)

    def _take_in(self) -> bool:
        """Take in the replies that have come; return whether some are still out."""
        if self._open:
            for reply in list(self._grid.pull_messages(list(self._open))):
                node = self._open.pop(reply.metadata.reply_to_message_id, None)
                if node is not None:
                    self._take(node, reply)
        return bool(self._open)

    def _take(self, node: int, reply: Message) -> None:
        if reply.has_error():
            self._refuse(node, error_sentence(reply))
            if went_astray(reply):
                self._lost.add(node)
            return
        self.refusals.learn(node, place_of(reply))
        embeddings: dict[str, torch.Tensor] = {}
        num_bytes = 0
        try:
            message_bytes = serialized_bytes(reply)
        except Exception:  # of numbers and texts that Flower's messages cannot hold, but its JSON can
            self._refuse(node, "Refused: records that are none of Flower's.")
            return
        try:
            payload = payload_of(reply)
            rows = decode_prompts(payload, self._limits.max_prompts)
            if self._embedding_shape is not None:
                embeddings, num_bytes = embeddings_of(reply, *self._embedding_shape)
        except PromptError as error:
            self._refuse(node, str(error))
            return
        kept, refused = screen_prompts(
            rows,
            self._limits,
            class_names=self._class_names,
            domains=self._domains,
            embeddings=None if self._embedding_shape is None else embeddings.keys(),
        )
        for reason, count in sorted(refused.items()):
            self._refuse(node, f"Refused: {reason}.", count)
        if not kept:
            self._refuse(node, "It sent no prompt that can be used.")
            return
        if unreadable := num_unreadable_of(reply):
            log(WARNING, "prompt round: client %s cannot read %s images", self.refusals.name_of(node), unreadable)
            self._unreadable[node] = unreadable
        if (defended := defended_of(reply)) is not None:
            self._defended[node] = defended
        self._uploads[node] = kept
        self._embeddings |= embeddings
        self.message_bytes.append(message_bytes)
        self.payload_bytes.append(len(payload) + num_bytes)

    def _refuse(self, node: int, reason: str, count: int = 1) -> None:
        self.refusals.add(node, reason, count)
        log(WARNING, "prompt round: client %s: %s (%s)", self.refusals.name_of(node), reason, count)
