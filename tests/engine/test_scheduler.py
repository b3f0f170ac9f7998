import pytest

from engine.errors import EngineFullError
from engine.sampling import FinishReason, SamplingParams
from engine.scheduler import CHUNK, Scheduler
from engine.sequence import Sequence, Status


def made(prompt: int = 3, new: int = 5) -> Sequence:
    return Sequence(tuple(range(prompt)), SamplingParams(new, seed=0))


def scheduler(**changes: int) -> Scheduler:
    limits = {"max_waiting": 8, "max_running": 2, "kv_tokens": 1000, "prefill_tokens": 2 * CHUNK}
    return Scheduler(**(limits | changes))


def started(subject: Scheduler, *sequences: Sequence) -> None:
    for sequence in sequences:
        subject.admit(sequence)
        subject.start(sequence)


def test_all_places_can_be_taken_before_a_step_and_are_as_many_after_it() -> None:
    subject = scheduler(max_waiting=3, max_running=2)
    sequences = [made() for _ in range(5)]
    started(subject, *sequences[:4])
    subject.admit(sequences[4])
    for _ in range(2):
        with pytest.raises(EngineFullError):
            subject.admit(made())
        subject.schedule()


@pytest.mark.parametrize("status", ["admitted", "waiting", "running"])
def test_who_leaves_makes_place_for_one(status: str) -> None:
    subject = scheduler(max_waiting=2, max_running=1)
    sequences = [made() for _ in range(3)]
    started(subject, *sequences[:2])
    subject.schedule()
    subject.admit(sequences[2])
    leaving = {s.status: s for s in sequences}[Status(status)]
    subject.end(leaving, Status.CANCELLED, FinishReason.CANCELLED)
    subject.admit(made())
    with pytest.raises(EngineFullError):
        subject.admit(made())


def test_slots_are_filled_in_the_order_of_arrival() -> None:
    subject = scheduler()
    sequences = [made() for _ in range(4)]
    started(subject, *sequences)
    subject.schedule()
    assert subject.running == sequences[:2]
    subject.end(sequences[0], Status.FINISHED, FinishReason.STOP)
    subject.schedule()
    assert subject.running == sequences[1:3]


def test_a_big_request_that_waits_for_room_is_not_overtaken() -> None:
    subject = scheduler(kv_tokens=20)
    small, big, late = made(3, 5), made(3, 15), made(1, 1)
    started(subject, small, big, late)
    subject.schedule()
    assert subject.running == [small]
    subject.end(small, Status.FINISHED, FinishReason.STOP)
    subject.schedule()
    assert subject.running == [big, late]


def test_a_request_that_can_never_run_is_refused() -> None:
    with pytest.raises(ValueError):
        scheduler(kv_tokens=7).admit(made(3, 5))


def test_a_long_prompt_is_computed_in_chunks_beside_the_others() -> None:
    subject = scheduler()
    long, short = made(CHUNK * 2 + 5), made()
    started(subject, long, short)
    assert [(c.start, c.stop) for c in subject.schedule().prefill] == [(0, CHUNK), (0, 3)]
    long.computed, short.computed = CHUNK, 3
    short.output_ids.append(1)
    plan = subject.schedule()
    assert plan.decode == (short,)
    assert [(c.start, c.stop) for c in plan.prefill] == [(CHUNK, 2 * CHUNK)]
    long.computed = 2 * CHUNK
    plan = subject.schedule()
    assert plan.prefill[0].ends_prompt
    assert plan.sampled == (short, long)


def test_a_chunk_never_shrinks_to_what_room_is_left() -> None:
    subject = scheduler(prefill_tokens=CHUNK)
    started(subject, made(10), made(CHUNK))
    assert [c.stop for c in subject.schedule().prefill] == [10]


@pytest.mark.parametrize("status", ["admitted", "waiting", "running"])
def test_a_sequence_can_end_wherever_it_is_and_leaves_nothing(status: str) -> None:
    subject = scheduler(max_running=1)
    sequences = [made() for _ in range(3)]
    started(subject, *sequences[:2])
    subject.schedule()
    subject.admit(sequences[2])
    ending = {s.status: s for s in sequences}[Status(status)]
    for reason in (FinishReason.CANCELLED, FinishReason.ERROR):
        subject.end(ending, Status.CANCELLED, reason)
    assert ending.finish_reason is FinishReason.CANCELLED
    for sequence in sequences:
        subject.end(sequence, Status.FAILED, FinishReason.ERROR)
    assert not subject.has_work
    assert not subject.admitted
    assert subject.promised_tokens == 0
