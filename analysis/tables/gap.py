"""Table of the gap between training and decoding: teacher-forced acceptance and that of real rounds, by slot."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from analysis.read import details
from analysis.statistics.acceptance_gap import TeacherForcedSums, paired
from analysis.statistics.histograms import join
from analysis.statistics.intervals import RESAMPLES
from analysis.tables import frames as tables
from analysis.tables import groups as grouping
from analysis.tables.groups import Group
from analysis.tables.positions import scopes
from analysis.tables.sheets import Cell, Sheet, bracket, only, size

LENGTH = 0  # the `slot` of a row that compares lengths
DECAY = -1  # and of a row that compares suffix decays
WHOLE = {
    LENGTH: {"forced": "expected_length", "on_policy": "accepted_length", "gap": "length_gap"},
    DECAY: {"forced": "forced_decay", "on_policy": "decay", "gap": "decay_gap"},
}
NAMES = {LENGTH: "length", DECAY: "decay"}


def table(found: Sequence[Group], resamples: int = RESAMPLES, seed: int = 0) -> pd.DataFrame:
    """One row per variant, domain and slot, one with `slot` 0 (expected beside accepted length) and one with `slot` -1
    (the decay of acceptance over every anchor beside that of the rounds that survived to a slot).

    forced, on_policy: conditional acceptance (lengths, decays in those rows); gap = forced - on_policy with the bounds
    of the paired bootstrap over prompts; acceptance: mean alpha, what training reports; survival of both; anchors and
    rounds behind them. Empty where no run was evaluated with teacher_forced=true.
    """
    rows = []
    for domain, same in scopes(found):
        parts = [part for part in (details.forced(group.runs) for group in same) if part is not None]
        if not parts:
            continue
        prompts = [prompt for sums, _ in parts for prompt in sums.prompts]
        whole = TeacherForcedSums.of(prompts, [row for sums, _ in parts for row in sums.sums.tolist()])
        both = paired(join([runs.counts() for _, runs in parts]), whole, resamples, seed)
        if both is None:
            continue
        head = {key: value for key, value in tables.keys(same[0]).items() if key != "benchmark"} | {"domain": domain}
        for slot, names in WHOLE.items():
            values = {name: both.length[key][0] for name, key in names.items()}
            ends = dict(zip(("low", "high"), both.length[names["gap"]][1:], strict=True))
            rows.append(head | {"slot": slot} | values | ends | tables.extra(same[0]))
        for k in range(len(both.anchors)):
            value = {name: float(triple[0][k]) for name, triple in both.slots.items()}
            numbers = {"slot": k + 1, "forced": value["conditional"], "on_policy": value["on_policy"]}
            numbers |= {"gap": value["gap"], "low": float(both.slots["gap"][1][k])}
            numbers |= {"high": float(both.slots["gap"][2][k]), "acceptance": value["acceptance"]}
            numbers |= {"survival": value["survival"], "on_policy_survival": value["on_policy_survival"]}
            numbers |= {"anchors": int(both.anchors[k]), "rounds": int(both.rounds[k])}
            rows.append(head | numbers | tables.extra(same[0]))
    return pd.DataFrame(rows)


def sheets(found: Sequence[Group], frame: pd.DataFrame) -> list[Sheet]:
    """One sheet per section: a line per variant, domain and slot."""
    made = []
    note = (
        "Teacher-forced: on the decoded text, every anchor, the true tokens before each slot. Acceptance: mean "
        "overlap of draft and target, what training reports. Gap: teacher-forced less on-policy, 95% paired bootstrap "
        "over prompts; above zero, training promises more than decoding keeps. Lengths: expected and accepted. Decay: "
        "slope of log acceptance a slot, of every anchor (teacher-forced) and of the rounds that accepted every slot "
        "before (on-policy), which are easier places."
    )
    columns = [
        "method",
        "domain",
        "slot",
        "acceptance",
        "teacher-forced",
        "on-policy",
        "gap [95%]",
        "anchors",
        "rounds",
    ]
    for section, part in grouping.sections(found):
        domains = list(grouping.domains(part))
        shown = only(frame, {"domain": tables.ALL if len(domains) > 1 else domains[0]} | section)
        rows = [
            [
                Cell(row["variant"]),
                Cell(row["domain"]),
                Cell(NAMES.get(row["slot"], str(row["slot"])), sort=row["slot"]),
                *(Cell("-" if pd.isna(row[n]) else f"{row[n]:.3f}", sort=row[n]) for n in ("acceptance", "forced")),
                Cell("-" if pd.isna(row["on_policy"]) else f"{row['on_policy']:.3f}", sort=row["on_policy"]),
                Cell(bracket(row["gap"], row["low"], row["high"], sign=True), sort=row["gap"]),
                *(Cell("-" if pd.isna(row[n]) else size(row[n]), sort=row[n]) for n in ("anchors", "rounds")),
            ]
            for _, row in shown.iterrows()
        ]
        if rows:
            title = f"Teacher-forced against on-policy acceptance: {grouping.title(section)}"
            made.append(Sheet("teacher_forced", title, columns, rows, notes=[note]))
    return made
