/* credentials ENDPOINT send [FILE] | credentials ENDPOINT recv
 *
 * send: one byte with this process's credentials as SCM_CREDENTIALS and, where FILE is named, its descriptor as
 *       SCM_RIGHTS in the same message.
 * recv: asks for credentials (SO_PASSCRED), says so with one byte, receives a message and prints
 *       "SCM_CREDENTIALS PID UID GID" and "SCM_RIGHTS COUNT", then what the descriptors hold.
 * Both print "SO_PEERCRED PID UID GID" first.  Exit status 77 where the system has no SO_PASSCRED.
 */
#include "fdpass.h"

#if defined(SO_PASSCRED) && defined(SCM_CREDENTIALS)

static void print_peer(int sock)
{
    struct ucred peer;
    socklen_t size = sizeof peer;
    if (getsockopt(sock, SOL_SOCKET, SO_PEERCRED, &peer, &size) < 0)
        die("SO_PEERCRED");
    printf("SO_PEERCRED %ld %ld %ld\n", (long)peer.pid, (long)peer.uid, (long)peer.gid);
    fflush(stdout);
}

static void send_credentials(int sock, const char *path)
{
    union {
        struct cmsghdr align;
        char room[CMSG_SPACE(sizeof(struct ucred)) + CMSG_SPACE(sizeof(int))];
    } control;
    struct iovec part = {.iov_base = (void *)(size_t) "C", .iov_len = 1};
    struct msghdr message;
    memset(&message, 0, sizeof message);
    memset(&control, 0, sizeof control);
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control.room;
    message.msg_controllen = CMSG_SPACE(sizeof(struct ucred)) + (path != NULL ? CMSG_SPACE(sizeof(int)) : 0);

    struct ucred self = {.pid = getpid(), .uid = getuid(), .gid = getgid()};
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_CREDENTIALS;
    header->cmsg_len = CMSG_LEN(sizeof self);
    memcpy(CMSG_DATA(header), &self, sizeof self);

    int fd = -1;
    if (path != NULL) {
        fd = open_for_reading(path);
        header = CMSG_NXTHDR(&message, header);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(sizeof fd);
        memcpy(CMSG_DATA(header), &fd, sizeof fd);
    }
    if (sendmsg(sock, &message, MSG_NOSIGNAL) != 1)
        die("sendmsg");
    if (fd >= 0)
        close(fd);
}

static void receive_credentials(int sock)
{
    union {
        struct cmsghdr align;
        char room[CMSG_SPACE(sizeof(struct ucred)) + CMSG_SPACE(sizeof(int) * MAX_FDS)];
    } control;
    char data;
    struct iovec part = {.iov_base = &data, .iov_len = 1};
    struct msghdr message;
    int on = 1;
    int fds[MAX_FDS];
    size_t count = 0;
    if (setsockopt(sock, SOL_SOCKET, SO_PASSCRED, &on, sizeof on) < 0)
        die("SO_PASSCRED");
    send_message(sock, "R", 1, NULL, 0);
    memset(&message, 0, sizeof message);
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control.room;
    message.msg_controllen = sizeof control.room;
    if (recvmsg(sock, &message, MSG_CMSG_CLOEXEC) != 1)
        die("recvmsg");
    if (message.msg_flags & MSG_CTRUNC)
        fail("the kernel dropped control data");
    for (struct cmsghdr *header = CMSG_FIRSTHDR(&message); header != NULL; header = CMSG_NXTHDR(&message, header)) {
        if (header->cmsg_level != SOL_SOCKET)
            continue;
        if (header->cmsg_type == SCM_CREDENTIALS) {
            struct ucred sender;
            memcpy(&sender, CMSG_DATA(header), sizeof sender);
            printf("SCM_CREDENTIALS %ld %ld %ld\n", (long)sender.pid, (long)sender.uid, (long)sender.gid);
        } else if (header->cmsg_type == SCM_RIGHTS) {
            count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
            memcpy(fds, CMSG_DATA(header), count * sizeof(int));
        }
    }
    printf("SCM_RIGHTS %zu\n", count);
    fflush(stdout);
    for (size_t i = 0; i < count; i++)
        print_contents(fds[i]);
}

int main(int argc, char **argv)
{
    if (argc < 3)
        fail("usage: credentials ENDPOINT send [FILE] | credentials ENDPOINT recv");
    int sock = endpoint(argv[1]);
    print_peer(sock);
    if (strcmp(argv[2], "send") == 0 && argc <= 4)
        send_credentials(sock, argv[3]);
    else if (strcmp(argv[2], "recv") == 0 && argc == 3)
        receive_credentials(sock);
    else
        fail("role: send [FILE], or recv");
    close(sock);
    return 0;
}

#else

int main(void)
{
    fprintf(stderr, "no SO_PASSCRED on this system\n");
    return 77;
}

#endif
