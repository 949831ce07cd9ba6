/* What the small C peers share: an endpoint named on the command line, and one message with descriptors.
 *
 * They are written against sendmsg(2), recvmsg(2), cmsg(3) and unix(7) alone, so that what passes between them and
 * fdshare is plain SCM_RIGHTS.
 *
 *   ENDPOINT = fd:N                        a connected socket, inherited as descriptor N
 *            | connect:TYPE:PATH           TYPE is stream or seqpacket
 *            | listen:TYPE:PATH            binds PATH, accepts one peer, unlinks PATH
 */
#ifndef FDPASS_H
#define FDPASS_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* struct ucred, MSG_CMSG_CLOEXEC */
#endif
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

#ifndef MSG_CMSG_CLOEXEC
#define MSG_CMSG_CLOEXEC 0
#endif
#ifndef MSG_NOSIGNAL
#define MSG_NOSIGNAL 0
#endif

enum { MAX_FDS = 253 }; /* SCM_MAX_FD of Linux */

static inline void die(const char *what)
{
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(1);
}

static inline void fail(const char *why)
{
    fprintf(stderr, "%s\n", why);
    exit(2);
}

static inline long number(const char *text)
{
    char *end;
    long value = strtol(text, &end, 10);
    if (*text == '\0' || *end != '\0' || value < 0)
        fail("not a number");
    return value;
}

static inline int open_for_reading(const char *path)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        die(path);
    return fd;
}

/* Return a connected socket for ENDPOINT. */
static inline int endpoint(const char *text)
{
    if (strncmp(text, "fd:", 3) == 0)
        return (int)number(text + 3);

    int listening = strncmp(text, "listen:", 7) == 0;
    if (!listening && strncmp(text, "connect:", 8) != 0)
        fail("endpoint: fd:N, connect:TYPE:PATH or listen:TYPE:PATH");
    const char *rest = strchr(text, ':') + 1;
    const char *path = strchr(rest, ':');
    int type;
    if (path != NULL && strncmp(rest, "stream:", 7) == 0)
        type = SOCK_STREAM;
    else if (path != NULL && strncmp(rest, "seqpacket:", 10) == 0)
        type = SOCK_SEQPACKET;
    else
        fail("type: stream or seqpacket");
    path++;

    struct sockaddr_un address;
    memset(&address, 0, sizeof address);
    address.sun_family = AF_UNIX;
    if (strlen(path) >= sizeof address.sun_path)
        fail("path too long for AF_UNIX");
    strcpy(address.sun_path, path);

    int sock = socket(AF_UNIX, type, 0);
    if (sock < 0)
        die("socket");
    if (!listening) {
        if (connect(sock, (struct sockaddr *)&address, sizeof address) < 0)
            die("connect");
        return sock;
    }
    if (bind(sock, (struct sockaddr *)&address, sizeof address) < 0)
        die("bind");
    if (listen(sock, 1) < 0)
        die("listen");
    printf("listening\n"); /* the test waits for this line, not for a while */
    fflush(stdout);
    int peer = accept(sock, NULL, NULL);
    if (peer < 0)
        die("accept");
    close(sock);
    unlink(path);
    return peer;
}

/* Send `size` bytes with `count` descriptors in one message; the bytes must all fit.  Return 0 where the peer has gone. */
static inline int try_to_send(int sock, const void *data, size_t size, const int *fds, size_t count)
{
    union {
        struct cmsghdr align;
        char room[CMSG_SPACE(sizeof(int) * MAX_FDS)];
    } control;
    struct iovec part = {.iov_base = (void *)(size_t)data, .iov_len = size};
    struct msghdr message;
    memset(&message, 0, sizeof message);
    memset(&control, 0, sizeof control);
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    if (count > MAX_FDS)
        fail("too many descriptors for one message");
    if (count > 0) {
        message.msg_control = control.room;
        message.msg_controllen = CMSG_SPACE(sizeof(int) * count);
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(sizeof(int) * count);
        memcpy(CMSG_DATA(header), fds, sizeof(int) * count);
    }
    ssize_t sent;
    do
        sent = sendmsg(sock, &message, MSG_NOSIGNAL);
    while (sent < 0 && errno == EINTR);
    if (sent < 0 && errno == EPIPE)
        return 0;
    if (sent < 0)
        die("sendmsg");
    if ((size_t)sent != size)
        fail("short write");
    return 1;
}

/* The same, where the peer must be there. */
static inline void send_message(int sock, const void *data, size_t size, const int *fds, size_t count)
{
    if (!try_to_send(sock, data, size, fds, count))
        fail("the peer went away");
}

/* Receive one message: return its size, 0 at the end; `fds` has room for MAX_FDS, `count` says how many came. */
static inline size_t receive_message(int sock, void *data, size_t size, int *fds, size_t *count)
{
    union {
        struct cmsghdr align;
        char room[CMSG_SPACE(sizeof(int) * MAX_FDS)];
    } control;
    struct iovec part = {.iov_base = data, .iov_len = size};
    struct msghdr message;
    memset(&message, 0, sizeof message);
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control.room;
    message.msg_controllen = sizeof control.room;
    ssize_t received;
    int resets = 0; /* SEQPACKET tells of a reset once, before it gives what the peer had sent and closed behind */
    do
        received = recvmsg(sock, &message, MSG_CMSG_CLOEXEC);
    while (received < 0 && (errno == EINTR || (errno == ECONNRESET && resets++ == 0)));
    if (received < 0)
        die("recvmsg");
    *count = 0;
    for (struct cmsghdr *header = CMSG_FIRSTHDR(&message); header != NULL; header = CMSG_NXTHDR(&message, header)) {
        if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS)
            continue;
        size_t here = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        memcpy(fds + *count, CMSG_DATA(header), here * sizeof(int));
        *count += here;
    }
    if (message.msg_flags & MSG_CTRUNC)
        fail("the kernel dropped descriptors");
    if (message.msg_flags & MSG_TRUNC)
        fail("the kernel cut the message");
    return (size_t)received;
}

/* Copy what is left of `fd` to stdout, and close it. */
static inline void print_contents(int fd)
{
    char chunk[4096];
    ssize_t got;
    while ((got = read(fd, chunk, sizeof chunk)) != 0) {
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            die("read");
        fwrite(chunk, 1, (size_t)got, stdout);
    }
    fflush(stdout);
    close(fd);
}

#endif
