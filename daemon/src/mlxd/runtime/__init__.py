"""The only loop between the core and the world, and what it performs with.

    runtime      whatever happens becomes an event, whatever the core wants is done; what the server calls
    batches      batch jobs: checked, put in, run item by item, read out
    ledger       the file that batch jobs are kept in
    generations  the generations under way, from admission to their last word
    asking       what a model's worker is asked that is no generation
    holding      models that are to be loaded, for a while or as long as somebody holds them
    preloads     models that the settings want loaded
    supply       models that are to be here: names, downloads, deletes
    crew         the workers, and what each may take of the memory
    measuring    what the system has of memory, and what the workers hold of it
    jobs         what outlives a request: told, awaited, watched
    goals        what callers wait for the core to reach
    figures      what became of requests: the statistics, and the log of slow ones

Each knows those below it. Nothing here decides.
"""

from .runtime import Runtime

__all__ = ["Runtime"]
