"""What an exit code of a job says, the same under every MPI."""

PROGRAM = 1  # of a Python exception; a program's own codes are passed on
CONFIGURATION = 2
HOST = 69  # sysexits.h: EX_UNAVAILABLE
STALL = 70
MEMORY = 71
PREEMPTED = 75  # sysexits.h: EX_TEMPFAIL, to be tried again
NOT_STOPPED = 124
INTERRUPTED = 130
UNREAD = 141  # as the shell says of SIGPIPE: nobody reads the output on, such as `| head`

KINDS = {
    CONFIGURATION: "configuration",
    HOST: "host",
    STALL: "stall",
    MEMORY: "out of memory",
    PREEMPTED: "preempted",
    NOT_STOPPED: "did not stop in time",
    INTERRUPTED: "interrupted",
}


def kind_of(code: int) -> str:
    """Returns the kind of failure of an exit code that is not 0; what is no other kind is an error of the program."""
    return KINDS.get(code, "program error")
