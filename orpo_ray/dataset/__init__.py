"""Token sets on disk, and the batches that each rank trains on; no torch, no Ray.

A token set is a directory of token shards (Parquet files of prompt groups) and their manifest.

The road of a pair, from a line of a file to an optimizer step, and its form at each station:

1. `preference.reading`: a file is cut into `Split`s; a line of one is read as a `RawRow`, with its
   number, so that every row has a `RowId` from here on.
2. `preference.shapes.RowReader`: the columns decide the shape (texts, messages, ShareGPT, rankings,
   ...), and `preference.pairing.make_pair` where the prompt ends. A row becomes a `ParsedRow` of
   `Record`s, one per pair, or a `Refusal` with its `Reason`, which goes to `quarantine/` and is
   counted. What is odd about a row that is kept is a `Note`, which is counted, too.
3. `preference.templates.render`: the chat template; a `PairText` of prompt, chosen and rejected.
   `preference.special_tokens` and `preference.fidelity` compare it with the row.
4. `preference.tokenization.PairTokenizer`: token ids cut at the end of the prompt and to
   `max_length`; a `TokenizedPair`, whose `PromptGroup` is a prompt, its completions and pairs.
5. `dataset.tokenize` runs 1 to 4 in a data task for one split, and `dataset.shards` writes its
   groups as a Parquet file. `dataset.pair_index` keeps hashes and lengths of each pair beside it.
6. `dataset.ingest`, on the driver, sees those only: it finds duplicates, has shards written again
   where pairs are dropped or grouped (`dataset.regroup`), and commits the `TokenSet`.
7. `dataset.order.Order`: a pure function of seed, epoch and shard lengths; the groups of global
   batch k, the same at every world size.
8. `dataset.stream.TokenStream`, on every rank: reads those groups, shares them out by tokens, and
   packs its share (`dataset.packing`): a `StepBatch` of `PackedRow`s, with the counts of the whole
   global batch that the loss is divided by.
9. `models.microbatch.Microbatch`: a row's arrays as tensors on the device, its attention layout and
   the head's `Targets`. `models.orpo_model.OrpoModel` gives an `OrpoOutput`: loss and metric sums.
10. `training.step.train_step`: backward passes of all microbatches, then one optimizer step; the
    rows go to `ledger.jsonl`.
"""
