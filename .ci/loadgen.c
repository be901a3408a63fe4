/* The HTTP client of .ci/bench for lists of files: `loadgen PORT CONNECTIONS each|shared < LIST`.
 *
 * LIST has a line "SIZE URL" for each file. PORT is that of a proxy on 127.0.0.1; the targets are absolute.
 * "each": every connection fetches every file, each connection beginning at another one,
 * and each from an address of its own, as pkgproxy validates files that one address requests again within a minute.
 * "shared": every file is fetched once, by the next connection that is free.
 *
 * Prints the seconds until all files had arrived, and the longest time from a request to the first byte of its
 * body. Any response but a complete one with status 200 is an error: exit status 1, with a message.
 *
 * It uses little CPU time: one thread, persistent connections, and bodies that the kernel discards (MSG_TRUNC).
 */
#define _GNU_SOURCE
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

struct file {
    char *request;
    long long size;
};

struct connection {
    int socket, number, begun;
    int reused;           /* it has had a response: the server may close it at any time */
    struct file *file;
    double sent;          /* when the request was sent */
    char head[8192];
    size_t length;        /* bytes in `head` */
    long long left;       /* bytes of the body still to come; -1 while reading the head */
};

static struct file *files;
static int count, connections, active, taken, shared, selector, port;
static double slowest;

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static void fail(struct connection *client, const char *what)
{
    fprintf(stderr, "%s: %.*s\n%.*s\n", what, (int)strcspn(client->file->request, "\r"),
            client->file->request, (int)client->length, client->head);
    exit(1);
}

static void read_list(void)
{
    char line[4096], url[4000], host[256];
    long long size;
    while (fgets(line, sizeof line, stdin)) {
        if (sscanf(line, "%lld %3999s", &size, url) != 2 || sscanf(url, "http://%255[^/]", host) != 1)
            exit(2);
        files = realloc(files, (count + 1) * sizeof *files);
        files[count].size = size;
        if (asprintf(&files[count++].request, "GET %s HTTP/1.1\r\nHost: %s\r\n\r\n", url, host) < 0)
            exit(1);
    }
}

static void connect_client(struct connection *client)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr = {htonl(INADDR_LOOPBACK)}};
    struct sockaddr_in own = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK + !shared * (256 + client->number))}};
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = client};
    client->socket = socket(AF_INET, SOCK_STREAM, 0);
    client->reused = 0;
    if (bind(client->socket, (struct sockaddr *)&own, sizeof own) < 0
            || connect(client->socket, (struct sockaddr *)&address, sizeof address) < 0
            || epoll_ctl(selector, EPOLL_CTL_ADD, client->socket, &event) < 0) {
        perror("connect");
        exit(1);
    }
}

static void send_request(struct connection *client)
{
    client->length = 0;
    client->left = -1;
    if (client->socket < 0)
        connect_client(client);
    /* The buffer of the socket is empty and has room.  If the server has closed the connection, receive() sees it. */
    send(client->socket, client->file->request, strlen(client->file->request), MSG_NOSIGNAL);
}

static void close_client(struct connection *client)
{
    close(client->socket);
    client->socket = -1;
}

static void request_next(struct connection *client)
{
    int number = shared ? taken++ : client->begun++;
    if (number >= count) {
        if (client->socket >= 0)
            close_client(client);
        active--;
        return;
    }
    client->file = &files[shared ? number : (number + (long long)client->number * count / connections) % count];
    client->sent = now();
    send_request(client);
}

static void body_came(struct connection *client, long long bytes)
{
    if (client->left == client->file->size && bytes && now() - client->sent > slowest)
        slowest = now() - client->sent;
    client->left -= bytes;
    if (client->left < 0)
        fail(client, "the body is too long");
}

/* Returns 0 if only a part of the head has come. */
static int parse_head(struct connection *client)
{
    char *field, *end;
    client->head[client->length] = 0;
    if (!(end = strstr(client->head, "\r\n\r\n"))) {
        if (client->length == sizeof client->head - 1)
            fail(client, "the head is too long");
        return 0;
    }
    end[2] = 0;
    field = strcasestr(client->head, "\ncontent-length:");
    if (strncmp(client->head, "HTTP/1.", 7) || strncmp(client->head + 8, " 200 ", 5)
            || !field || strtoll(field + 16, NULL, 10) != client->file->size)
        fail(client, "wrong status or length");
    client->left = client->file->size;
    body_came(client, client->head + client->length - (end + 4));
    return 1;
}

static void receive(struct connection *client)
{
    ssize_t bytes;
    if (client->left < 0) {
        bytes = recv(client->socket, client->head + client->length, sizeof client->head - 1 - client->length, 0);
        if (bytes <= 0 && client->reused && !client->length) {   /* RFC 9112, section 9.3.1 */
            close_client(client);
            send_request(client);
            return;
        }
        if (bytes <= 0)
            fail(client, "no response");
        client->length += bytes;
        if (!parse_head(client))
            return;
    } else {
        bytes = recv(client->socket, NULL, client->left, MSG_TRUNC);
        if (bytes <= 0)
            fail(client, "truncated body");
        body_came(client, bytes);
    }
    if (client->left)
        return;
    client->reused = 1;
    if (strcasestr(client->head, "\nconnection: close"))
        close_client(client);
    request_next(client);
}

int main(int argc, char **argv)
{
    struct epoll_event events[64];
    struct connection *clients;
    double began = now();
    if (argc != 4)
        return 2;
    port = atoi(argv[1]);
    connections = active = atoi(argv[2]);
    shared = !strcmp(argv[3], "shared");
    read_list();
    selector = epoll_create1(0);
    clients = calloc(connections, sizeof *clients);
    for (int number = 0; number < connections; number++) {
        clients[number].socket = -1;
        clients[number].number = number;
        request_next(&clients[number]);
    }
    while (active) {
        int ready = epoll_wait(selector, events, 64, 60000);
        if (!ready)
            fail(clients, "nothing came for 60 s; the first connection");
        for (int index = 0; index < ready; index++)
            receive(events[index].data.ptr);
    }
    printf("%.6f %.6f\n", now() - began, slowest);
    return 0;
}
