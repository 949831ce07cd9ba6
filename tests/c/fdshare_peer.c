/* fdshare_peer ENDPOINT CODEC TEXT FILE: speak the protocol of docs/wire.md, version 1, with a Channel of a named connection.
 *
 * Says hello for CODEC ("bytes" or "pickle"), checks the other side's, sends one message, TEXT with FILE open for reading,
 * and receives messages until the peer closes.  Of each it prints "SIZE DESCRIPTORS" and what the descriptors hold; with
 * codec "bytes" also the payload, where it is short.  Where it listens (see fdpass.h) it is the other side.
 *
 * With codec "pickle" the message is a tuple of a string and an FdHandle, from a template: this program cannot read pickles.
 * Exit status 3 where the peer refused, whose reason goes to stderr; 4 where its version or codec is another.
 */
#include "fdpass.h"
#include <stdint.h>

enum {
    HELLO_SIZE = 32,
    HEADER_SIZE = 40,
    MAX_TEXT = 255,
    MAX_PACKET = HEADER_SIZE + 120 * 1024, /* what our hello says */
    MESSAGE = 1,
    BYTES = 2,
    NOTICE = 3,
    SEGMENT = 1,
    BUNDLE = 2,
    IN_SEGMENT = 4
};

struct packet {
    unsigned type, flags;
    uint32_t descriptors, buffers;
    uint64_t payload_size, segment_size;
    unsigned char *payload; /* in the packet, or allocated where it came in a segment */
    int fds[MAX_FDS];
};

static int stream; /* whether the socket is one */

static void put(unsigned char *at, uint64_t value, int bytes)
{
    for (int i = 0; i < bytes; i++)
        at[i] = (unsigned char)(value >> (8 * i));
}

static uint64_t get(const unsigned char *at, int bytes)
{
    uint64_t value = 0;
    for (int i = bytes; i > 0; i--)
        value = value << 8 | at[i - 1];
    return value;
}

/* --- the hello --- */

static void say_hello(int sock, const char *codec)
{
    unsigned char hello[HELLO_SIZE + MAX_TEXT];
    size_t length = strlen(codec);
    memset(hello, 0, sizeof hello);
    memcpy(hello, "fdshare", 8);
    hello[8] = 1;                      /* HELLO */
    hello[9] = hello[10] = 1;          /* this version of the protocol, and no other */
    hello[11] = (unsigned char)length;
    put(hello + 12, MAX_FDS, 4);       /* descriptors in a message */
    put(hello + 16, 120 * 1024, 4);    /* payload in a packet */
    put(hello + 24, 1u << 30, 8);      /* bytes in a message */
    memcpy(hello + HELLO_SIZE, codec, length);
    try_to_send(sock, hello, HELLO_SIZE + length, NULL, 0);
}

/* Check a hello; `size` bytes are all of it. */
static void check_hello(const unsigned char *hello, size_t size, const char *codec)
{
    char text[MAX_TEXT + 1];
    if (size < HELLO_SIZE || size != HELLO_SIZE + (size_t)hello[11])
        fail("a hello of a wrong size");
    memcpy(text, hello + HELLO_SIZE, hello[11]);
    text[hello[11]] = '\0';
    if (hello[8] == 2) {
        fprintf(stderr, "refused: %s\n", text);
        exit(3);
    }
    if (hello[8] != 1 || hello[9] > 1 || hello[10] < 1 || strcmp(text, codec) != 0) {
        fprintf(stderr, "the peer speaks versions %d to %d, codec %s\n", hello[9], hello[10], text);
        exit(4);
    }
}

/* --- packets --- */

/* A peer that has gone may have said why, which receiving will tell: so that is no error here. */
static void send_packet(int sock, const unsigned char *payload, size_t size, int fd)
{
    static unsigned char packet[MAX_PACKET + 1];
    int fds[1] = {fd};
    memset(packet, 0, HEADER_SIZE);
    packet[0] = MESSAGE;
    put(packet + 4, 1, 4);                           /* descriptors */
    put(packet + 16, size, 8);                       /* payload */
    put(packet + 32, (uint64_t)getpid() << 40 | 1, 8); /* nonce */
    memcpy(packet + HEADER_SIZE, payload, size);
    if (stream) {
        /* The header; then the descriptors with the first byte after it, and a final byte that says "finished". */
        packet[HEADER_SIZE + size] = 1;
        if (try_to_send(sock, packet, HEADER_SIZE, NULL, 0) && try_to_send(sock, packet + HEADER_SIZE, 1, fds, 1) && size > 0)
            try_to_send(sock, packet + HEADER_SIZE + 1, size, NULL, 0);
        return;
    }
    unsigned char notice[HEADER_SIZE];
    memset(notice, 0, sizeof notice);
    notice[0] = NOTICE;
    memcpy(notice + 1, packet + 1, 7); /* flags and descriptors of the packet to come */
    if (try_to_send(sock, notice, sizeof notice, NULL, 0))
        try_to_send(sock, packet, HEADER_SIZE + size, fds, 1);
}

static void send_in_codec(int sock, const char *codec, const char *text, int fd)
{
    unsigned char data[600];
    size_t length = strlen(text);
    if (length > 200)
        fail("TEXT: up to 200 bytes");
    if (strcmp(codec, "bytes") == 0) {
        send_packet(sock, (const unsigned char *)text, length, fd);
        return;
    }
    /* (TEXT, fdshare.reducers.take(0, S_IFREG)) in pickle protocol 4 */
    static const unsigned char handle[] = "\x8c\x10" "fdshare.reducers" "\x8c\x04" "take" "\x93" "K\0" "M\x00\x80" "\x86R";
    size_t size = 0;
    data[size++] = 0x80;
    data[size++] = 4;
    data[size++] = 0x8c; /* SHORT_BINUNICODE */
    data[size++] = (unsigned char)length;
    memcpy(data + size, text, length);
    size += length;
    memcpy(data + size, handle, sizeof handle - 1);
    size += sizeof handle - 1;
    data[size++] = 0x86; /* TUPLE2 */
    data[size++] = '.';
    send_packet(sock, data, size, fd);
}

/* Read exactly `size` bytes of a stream; 0 where it ends before the first. */
static size_t read_all(int sock, unsigned char *data, size_t size, int *fds, size_t *count)
{
    size_t done = 0;
    *count = 0;
    while (done < size) {
        size_t here = 0;
        size_t got = receive_message(sock, data + done, size - done, fds + *count, &here);
        *count += here;
        if (got == 0 && done == 0)
            return 0;
        if (got == 0)
            fail("the stream ends within a frame");
        done += got;
    }
    return done;
}

static void parse(const unsigned char *header, struct packet *packet)
{
    packet->type = header[0];
    packet->flags = header[1];
    packet->descriptors = (uint32_t)get(header + 4, 4);
    packet->buffers = (uint32_t)get(header + 8, 4);
    packet->payload_size = get(header + 16, 8);
    packet->segment_size = get(header + 24, 8);
    if (packet->type < MESSAGE || packet->type > NOTICE)
        fail("a packet of an unknown type");
    if (packet->flags & BUNDLE || packet->descriptors > MAX_FDS || packet->buffers > 0 || packet->segment_size > 1u << 30)
        fail("more than our hello takes");
    if (!(packet->flags & IN_SEGMENT) && packet->payload_size > 120 * 1024)
        fail("a payload larger than our hello takes");
}

/* The payload where it is in a segment: at its start. */
static unsigned char *read_segment(int fd, size_t size)
{
    unsigned char *data = malloc(size);
    if (data == NULL)
        die("malloc");
    for (size_t done = 0; done < size;) {
        ssize_t got = pread(fd, data + done, size - done, (off_t)done);
        if (got < 0 && errno == ESPIPE)
            got = read(fd, data + done, size - done); /* FILE: a pipe */
        if (got <= 0)
            die("the segment is shorter than said");
        done += (size_t)got;
    }
    close(fd);
    return data;
}

/* Receive one packet that is no notice; 0 at the end.  A hello is checked and skipped. */
static int receive_packet(int sock, const char *codec, struct packet *packet)
{
    static unsigned char data[MAX_PACKET + 1];
    size_t count, size;
    for (;;) {
        if (stream) {
            /* A hello's 32 bytes are fewer than a header's 40: look at those first. */
            size = read_all(sock, data, HELLO_SIZE, packet->fds, &count);
            if (size == 0)
                return 0;
            if (memcmp(data, "fdshare", 8) == 0) {
                size_t text = data[11];
                if (text > 0)
                    read_all(sock, data + HELLO_SIZE, text, packet->fds, &count);
                check_hello(data, HELLO_SIZE + text, codec);
                continue;
            }
            read_all(sock, data + HELLO_SIZE, HEADER_SIZE - HELLO_SIZE, packet->fds, &count);
            parse(data, packet);
            size_t rest = (packet->flags & IN_SEGMENT ? 0 : (size_t)packet->payload_size) + 1;
            read_all(sock, data + HEADER_SIZE, rest, packet->fds, &count);
            if (data[HEADER_SIZE + rest - 1] != 1)
                continue; /* the sender gave this one up */
        } else {
            size = receive_message(sock, data, sizeof data, packet->fds, &count);
            if (size == 0)
                return 0;
            if (size >= 8 && memcmp(data, "fdshare", 8) == 0) {
                check_hello(data, size, codec);
                continue;
            }
            if (data[0] == 0x80) { /* a bare pickle */
                memset(packet, 0, sizeof *packet);
                packet->type = MESSAGE;
                packet->payload_size = size;
                packet->payload = data;
                return 1;
            }
            if (size < HEADER_SIZE)
                fail("a packet shorter than its header");
            parse(data, packet);
            if (packet->type == NOTICE)
                continue; /* "look whether there is room for so many descriptors": there is */
            if (size != HEADER_SIZE + (packet->flags & IN_SEGMENT ? 0 : packet->payload_size))
                fail("a packet of a wrong size");
        }
        if (count != packet->descriptors + (packet->flags & SEGMENT ? 1 : 0))
            fail("another number of descriptors than said");
        packet->payload = data + HEADER_SIZE;
        if (packet->flags & SEGMENT) { /* its descriptor is the last */
            unsigned char *content = read_segment(packet->fds[count - 1], (size_t)packet->segment_size);
            if (packet->flags & IN_SEGMENT)
                packet->payload = content; /* for the life of this small program */
            else
                free(content);
        }
        return 1;
    }
}

int main(int argc, char **argv)
{
    if (argc != 5)
        fail("usage: fdshare_peer ENDPOINT bytes|pickle TEXT FILE");
    const char *codec = argv[2];
    int sock = endpoint(argv[1]);
    int type;
    socklen_t length = sizeof type;
    if (getsockopt(sock, SOL_SOCKET, SO_TYPE, &type, &length) < 0)
        die("SO_TYPE");
    stream = type == SOCK_STREAM;

    say_hello(sock, codec);
    int fd = open_for_reading(argv[4]);
    send_in_codec(sock, codec, argv[3], fd);
    close(fd);

    static struct packet packet;
    while (receive_packet(sock, codec, &packet)) {
        printf("%llu %u\n", (unsigned long long)packet.payload_size, (unsigned)packet.descriptors);
        if (strcmp(codec, "bytes") == 0 && packet.payload_size <= 100)
            printf("%.*s\n", (int)packet.payload_size, (const char *)packet.payload);
        fflush(stdout);
        for (uint32_t i = 0; i < packet.descriptors; i++)
            print_contents(packet.fds[i]);
    }
    close(sock);
    return 0;
}
