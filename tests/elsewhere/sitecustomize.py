"""Take away what macOS's Python lacks, before anything else is imported; for processes with this directory on PYTHONPATH.

The names go and sys.platform says darwin; the kernel underneath is still Linux's.
"""

import fcntl
import mmap
import os
import select
import signal
import socket
import sys
import sysconfig

_ABSENT = (
    (
        os,
        ("memfd_create", "eventfd", "pidfd_open", "P_PIDFD", "waitid", "pipe2", "posix_fallocate", "O_PATH"),
    ),
    (os, ("sched_getaffinity", "splice", "timerfd_create", "setresuid", "setresgid", "copy_file_range")),
    (select, ("epoll",)),
    (signal, ("pidfd_send_signal", "sigtimedwait", "sigwaitinfo")),
    (
        fcntl,
        (
            "F_SETPIPE_SZ",
            "F_GETPIPE_SZ",
            "F_ADD_SEALS",
            "F_GET_SEALS",
            "F_OFD_SETLK",
            "F_OFD_SETLKW",
            "F_SETSIG",
        ),
    ),
    (fcntl, ("F_SEAL_SEAL", "F_SEAL_SHRINK", "F_SEAL_GROW", "F_SEAL_WRITE")),
    (mmap, ("MAP_POPULATE", "MADV_HUGEPAGE")),
    (socket, ("SO_PEERCRED", "SO_PASSCRED", "SCM_CREDENTIALS", "MSG_CMSG_CLOEXEC", "MSG_NOSIGNAL")),
    (socket, ("SOCK_NONBLOCK", "SOCK_CLOEXEC", "AF_NETLINK")),
)

# sysconfig reads a file that is named after the platform.
os.environ.setdefault("_PYTHON_SYSCONFIGDATA_NAME", sysconfig._get_sysconfigdata_name())  # type: ignore[attr-defined]
sys.platform = "darwin"
sys.modules["_scproxy"] = type(sys)("_scproxy")  # of C, there alone; urllib wants it to exist
vars(sys.modules["_scproxy"]).update(_get_proxy_settings=dict, _get_proxies=dict)
for module, names in _ABSENT:
    for name in names:
        vars(module).pop(name, None)
