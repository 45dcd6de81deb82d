"""The paper's statements as functions over the tables of a results folder. Reads results only; never torch.

A claim is a function ``(Results) -> list[Comparison]`` (``catalogue.py`` lists them; ``comparisons.py`` has the
type). A comparison is a list of ``Statement``, each a number per seed that the claim says is positive, or lies within
``±margin``. ``described`` turns a comparison into words, ``decide_claims`` writes ``claims.json``, a contract for the
report and other tools: a list with one entry per claim, each with the fields

- ``number`` (``C1`` to ``C14``; ``C1b`` is a second view of C1), ``question`` (``RQ1`` | ``RQ2`` | ``RQ3``), ``id``,
  ``title``, ``statement``: which claim, and what the paper says;
- ``paper``: ``{"values": {"sft", "opd", "rlvr"}, "model", "source", "from_figures"}``, texts, for orientation;
- ``comparisons``: one or more entries, each with
    - ``id``, unique in the claim. Orders have ``paper`` (SFT from its own origin, as in the paper), ``same_origin``
      (SFT continued from the origin of OPD and RLVR), ``same_origin@steps``, ``same_origin@accuracy``,
      ``same_origin@norm`` and ``paper@norm``; other claims have their own ids;
    - ``matched``: ``end`` (each run's end) | ``steps`` (the largest common step) | ``accuracy`` (the first crossing of
      the largest accuracy that all reach) | ``norm`` (the largest relative update norm that all reach) | null (whole
      paths); ``matched_at``: where the runs were read, ``{"step": {run: step}, "level": {seed: level}}`` or ``{}``;
    - ``label``; ``runs`` ``{role or arm: [run, ...]}``; ``left_out`` (runs of a needed kind that were not used);
    - ``quantity`` (what ``measured`` holds, with its setting) and ``measured`` ``{run: number or {name: number}}``;
    - ``null`` (name of the null model or null) and ``null_measured`` ``{run: number}``;
    - ``statements``: the claim taken apart, each ``{"text", "values" {seed: number}, "shows_here": yes | no | not
      measured, "estimate", "interval": [low, high] or null, "evaluation_interval": [low, high] or null, "margin",
      "null_estimate", "null_shows": yes | no | no null, "verdict", "beyond_null", "explained_share", "explained":
      yes | no | no null, "seeds_needed", "yardstick", "reason"}``; an estimate above zero (or inside ``±margin``)
      is what the claim says; for an order it is the log ratio of the two sides. ``interval`` is over seeds (95% t; 90%
      where there is a margin: two one-sided tests at 5%); ``evaluation_interval`` is over resampled problems inside one
      seed, a description that no verdict rests on; ``yardstick`` is ``[sd, degrees of freedom]`` of such numbers
      between the baselines' seeds, where it stands in for the spread that a control with a single seed cannot show;
    - ``shows_here``: ``yes`` | ``partly`` | ``no`` | ``not measured``: plain description of this folder;
    - ``null_shows``: ``yes`` | ``partly`` | ``no`` | ``no null``: whether the matched null, put through the same
      statements, shows them too;
    - ``verdict``: ``held`` | ``did not hold`` | ``unresolved`` | ``not measured``, over seeds, never from a single
      seed without a yardstick: held if every statement held, did not hold if one did not;
    - ``beyond_null``: ``yes`` | ``no`` | ``unresolved`` | ``no null``: the same over seeds for value over null;
    - ``explained``: ``yes`` | ``no`` | ``no null``: whether the null has the whole of every difference, within a
      declared margin (an equivalence test; ``no`` is no proof of the opposite);
    - ``deciding``, ``estimate``, ``interval``: text and numbers of the statement nearest to the decision line;
    - ``seeds`` (behind the statements) and ``seeds_needed`` (how many would settle an unresolved verdict if the
      observed mean and spread stayed as they are; null where resolved or where it cannot be said);
    - ``reason``: why it is not decided, or null; ``sentence``: the above in words;
- ``shows_here``, ``null_shows``, ``verdict``, ``beyond_null``, ``explained``, ``estimate``, ``interval``, ``seeds``,
  ``seeds_needed``, ``reason``, ``sentence``: those of the comparison that speaks for the claim, named by ``summary``
  (its id): the earliest one of those in which most roles have a run, or for C10 to C13 the first.
"""

from geopd.claims.catalogue import CLAIMS, decide, decide_claims

__all__ = ["CLAIMS", "decide", "decide_claims"]
