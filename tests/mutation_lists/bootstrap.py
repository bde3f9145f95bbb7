"""Errors of bootstraps that many processes share, whose fixes `tests/mutations.py` takes out."""

from mutation_lists.mutation import Mutation

_WORK = "tests/bootstrap/test_work.py"

MUTATIONS = [
    Mutation(
        "two processes make the same part",
        "bpo_fast/bootstrap/work.py",
        "            if not mine:\n",
        "            if False:\n",
        f"{_WORK}::test_processes_that_share_a_folder_write_the_bytes_of_one[2]",
    ),
    Mutation(
        "a process with other samples joins in",
        "bpo_fast/runs/folder.py",
        "            if lock.read() != purpose.encode():\n",
        "            if False:\n",
        f"{_WORK}::test_processes_with_other_samples_keep_out_of_a_folder_at_work",
    ),
    Mutation(
        "a shard of other settings taken for this run's",
        "bpo_fast/bootstrap/work.py",
        'done["result"] == self._result(part)',
        "True",
        f"{_WORK}::test_a_further_kind_costs_only_itself_and_one_fewer_nothing",
    ),
    Mutation(
        "responses of another cut into parts made again",
        "bpo_fast/bootstrap/job.py",
        "                set_aside(self.folder)\n",
        "                pass\n",
        f"{_WORK}::test_another_cut_into_parts_costs_no_response",
    ),
    Mutation(
        "a rewritten answer kept though the answer it was made of has changed",
        "bpo_fast/bootstrap/job.py",
        "sample.answer if maker.needs_answer else None",
        "None",
        f"{_WORK}::test_a_changed_answer_costs_the_kinds_that_are_made_of_it",
    ),
    Mutation(
        "the last of several shards leaves the data set unfinished",
        "bpo_fast/bootstrap/run.py",
        "            if not all(map(worker.is_done, job.parts)):\n",
        "            if num_shards is not None:\n",
        f"{_WORK}::test_shards_make_their_parts_and_the_last_one_the_whole",
    ),
    Mutation(
        "what a killed process left half-written stays beside the shards",
        "bpo_fast/bootstrap/finish.py",
        "for folder in (job.folder, data, parts)",
        "for folder in ()",
        f"{_WORK}::test_a_finished_run_holds_nothing_that_a_killed_process_left_half_written",
    ),
    Mutation(
        "a flipped bit in a shard is read as text",
        "bpo_fast/data/parquet.py",
        "page_checksum_verification=True",
        "page_checksum_verification=False",
        "tests/data/test_parquet.py::test_a_damaged_shard_is_named_and_made_again_from_its_journal",
    ),
]
