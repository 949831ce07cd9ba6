/* The floor: what the kernel alone takes for a message over an AF_UNIX SOCK_SEQPACKET pair between two processes.
 *
 *   pingpong roundtrip|oneway|separate SIZE NFDS SECONDS
 *
 * roundtrip: a packet of SIZE bytes with NFDS descriptors goes there, the child closes them and a packet of SIZE bytes
 *            comes back.  More than 253 descriptors go in several packets, with one answer.
 * oneway:    packets go there; one answer for each batch.
 * separate:  as roundtrip, but the child answers before it closes, and closing is timed on its own.
 *
 * Prints one line for each batch: seconds an operation, and (separate only) seconds an operation for the closing.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifndef MSG_CMSG_CLOEXEC
#define MSG_CMSG_CLOEXEC 0
#endif

enum { MAX_FDS = 253, BATCHES = 10, ANSWER = 1 };

static char control[CMSG_SPACE(MAX_FDS * sizeof(int))];

static void die(const char *what) {
    perror(what);
    exit(1);
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void send_packet(int sock, char *data, size_t size, const int *fds, int nfds) {
    struct iovec iov = {data, size};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
    if (nfds > 0) {
        msg.msg_control = control;
        msg.msg_controllen = CMSG_SPACE(nfds * sizeof(int));
        memset(control, 0, msg.msg_controllen);
        struct cmsghdr *head = CMSG_FIRSTHDR(&msg);
        head->cmsg_level = SOL_SOCKET;
        head->cmsg_type = SCM_RIGHTS;
        head->cmsg_len = CMSG_LEN(nfds * sizeof(int));
        memcpy(CMSG_DATA(head), fds, nfds * sizeof(int));
    }
    while (sendmsg(sock, &msg, 0) < 0)
        if (errno != EINTR) die("sendmsg");
}

/* Returns how many descriptors were stored in fds, or -1 at the end. */
static int recv_packet(int sock, char *data, size_t size, int *fds) {
    struct iovec iov = {data, size};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    ssize_t got;
    while ((got = recvmsg(sock, &msg, MSG_CMSG_CLOEXEC)) < 0)
        if (errno != EINTR) die("recvmsg");
    if (got == 0) return -1;
    if (msg.msg_flags & MSG_CTRUNC) {
        fprintf(stderr, "descriptors were dropped\n");
        exit(1);
    }
    int count = 0;
    for (struct cmsghdr *head = CMSG_FIRSTHDR(&msg); head; head = CMSG_NXTHDR(&msg, head))
        if (head->cmsg_level == SOL_SOCKET && head->cmsg_type == SCM_RIGHTS) {
            int here = (int)((head->cmsg_len - CMSG_LEN(0)) / sizeof(int));
            memcpy(fds + count, CMSG_DATA(head), here * sizeof(int));
            count += here;
        }
    return count;
}

static void child(int sock, char *data, size_t size, int *fds, int separate) {
    int open = 0, count;
    while ((count = recv_packet(sock, data, size, fds + open)) >= 0) {
        open += count;
        int answer = data[0] == ANSWER;
        if (separate && answer) send_packet(sock, data, size, NULL, 0);
        if (separate && !answer) continue;
        double start = now();
        while (open > 0) close(fds[--open]);
        double took = now() - start;
        if (separate) memcpy(data, &took, sizeof took);
        if (answer) send_packet(sock, data, size, NULL, 0);
    }
    _exit(0);
}

struct job {
    int sock;
    char *data;
    size_t size;
    int *fds;
    int nfds;
    int oneway;
    int separate;
    double closing;
};

/* Does n operations and returns the seconds they took. */
static double operate(struct job *job, long n) {
    int spare[MAX_FDS];
    double total = 0, start = now();
    job->closing = 0;
    for (long i = 0; i < n; i++) {
        int sent = 0;
        do {
            int here = job->nfds - sent > MAX_FDS ? MAX_FDS : job->nfds - sent;
            sent += here;
            job->data[0] = sent == job->nfds && (!job->oneway || i == n - 1) ? ANSWER : 0;
            send_packet(job->sock, job->data, job->size, job->fds + sent - here, here);
        } while (sent < job->nfds);
        if (job->oneway && i < n - 1) continue;
        if (recv_packet(job->sock, job->data, job->size, spare) < 0) die("the child went away");
        if (job->separate) {
            double took;
            total += now() - start;
            if (recv_packet(job->sock, job->data, job->size, spare) < 0) die("the child went away");
            memcpy(&took, job->data, sizeof took);
            job->closing += took;
            start = now();
        }
    }
    return total + (job->separate ? 0 : now() - start);
}

int main(int argc, char **argv) {
    if (argc != 5) {
        fprintf(stderr, "usage: pingpong roundtrip|oneway|separate SIZE NFDS SECONDS\n");
        return 2;
    }
    struct job job = {
        .oneway = !strcmp(argv[1], "oneway"), .separate = !strcmp(argv[1], "separate"),
        .size = (size_t)atol(argv[2]), .nfds = atoi(argv[3])};
    double budget = atof(argv[4]);
    int pair[2];
    if (job.size < sizeof(double)) job.size = sizeof(double);
    job.data = calloc(1, job.size);
    job.fds = calloc((size_t)job.nfds + MAX_FDS, sizeof(int));
    if (!job.data || !job.fds) die("calloc");
    if (socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair) < 0) die("socketpair");
    pid_t pid = fork();
    if (pid < 0) die("fork");
    if (pid == 0) {
        close(pair[0]);
        child(pair[1], job.data, job.size, job.fds, job.separate);
    }
    close(pair[1]);
    job.sock = pair[0];
    for (int i = 0; i < job.nfds; i++)
        if ((job.fds[i] = socket(AF_INET, SOCK_STREAM, 0)) < 0) die("socket");

    long n = 1;
    double took = operate(&job, n);
    while (took < budget / BATCHES / 4 && n < 100000000) took = operate(&job, n *= 2);
    n = (long)((double)n * budget / BATCHES / (took > 0 ? took : 1e-9)) + 1;
    for (int i = 0; i < BATCHES; i++) {
        took = operate(&job, n);
        printf("%.12f %.12f\n", took / (double)n, job.closing / (double)n);
    }
    close(job.sock);
    int status;
    waitpid(pid, &status, 0);
    return status != 0;
}
