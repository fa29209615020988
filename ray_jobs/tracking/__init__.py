"""MLflow follows the journal of a run: later, from another process, and without the training noticing.

::

    training ----> journal.jsonl, system/*.jsonl, inputs.json, tracking.json      (the run folder)
        | starts, ends                    | reads
    following.follow ----> sender.Sender -+-> run_record   settings, tags, numbers
                              | keeps     +-> inputs       shard sets
                              v           +-> artefacts    small files and a card
                  tracking_progress.json  +-> models       checkpoints, registered versions

`client` reaches the store and says what is wrong with it; `state` is what of all this is kept in the run folder.
"""
