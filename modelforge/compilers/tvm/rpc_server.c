/* Serves tuning on a device: TVM's RPC in plain C, over the two libraries that every variant brings. No Python.
 *
 *   ./rpc_server HOST PORT KEY
 *
 * HOST is an address of this device (0.0.0.0: all), PORT 0 a free one; "listening on PORT" is said once it is. Serves one
 * session at a time, each in a process of its own and a folder of its own, for as long as it runs. It runs any code that
 * it is sent: only in a network where everyone is trusted. The words of the handshake are those of tvm/rpc/server.py.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <tvm/ffi/c_api.h>

enum { MAGIC = 0xFF271, MISMATCH = MAGIC + 2, MAX_HEADER = 1024 };

static char folder[PATH_MAX]; /* of the session that this process serves */

static void fail(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  fputs("rpc_server: ", stderr);
  vfprintf(stderr, format, arguments);
  fputc('\n', stderr);
  va_end(arguments);
  _exit(1);
}

/* ---- the runtime, found beside this program ---- */

static struct {
  int (*get_global)(const TVMFFIByteArray *, TVMFFIObjectHandle *);
  int (*set_global)(const TVMFFIByteArray *, TVMFFIObjectHandle, int);
  int (*create)(void *, TVMFFISafeCallType, void (*)(void *), TVMFFIObjectHandle *);
  int (*call)(TVMFFIObjectHandle, TVMFFIAny *, int32_t, TVMFFIAny *);
  int (*make_string)(const TVMFFIByteArray *, TVMFFIAny *);
  void (*raise)(const char *, const char *);
} ffi;

static void *open_beside(const char *name) {
  char path[PATH_MAX];
  ssize_t length = readlink("/proc/self/exe", path, sizeof path - 1);
  if (length <= 0) fail("cannot read /proc/self/exe: %s", strerror(errno));
  path[length] = '\0';
  char *slash = strrchr(path, '/');
  if ((size_t)(slash - path) + strlen(name) + 2 > sizeof path) fail("the path of this program is too long");
  strcpy(slash + 1, name);
  void *library = dlopen(path, RTLD_NOW | RTLD_GLOBAL); /* global: what is sent takes its symbols from the process */
  if (library == NULL) fail("cannot load %s: %s", name, dlerror());
  return library;
}

static void *must_find(void *library, const char *symbol) {
  void *address = dlsym(library, symbol);
  if (address == NULL) fail("libtvm_ffi.so has no %s: it is of another version than this program", symbol);
  return address;
}

static TVMFFIObjectHandle global_function(const char *name) {
  TVMFFIByteArray key = {name, strlen(name)};
  TVMFFIObjectHandle function = NULL;
  if (ffi.get_global(&key, &function) != 0 || function == NULL) fail("the runtime has no %s", name);
  return function;
}

static void serve_as(const char *name, TVMFFISafeCallType function) {
  TVMFFIByteArray key = {name, strlen(name)};
  TVMFFIObjectHandle handle = NULL;
  if (ffi.create(NULL, function, NULL, &handle) != 0 || ffi.set_global(&key, handle, 1) != 0)
    fail("cannot register %s", name);
}

/* ---- what a session asks for ---- */

/* The path in the session's folder that a file name stands for; -1, with an error raised, where it is none. */
static int path_of(const TVMFFIAny *name, char *path) {
  const char *data = NULL;
  size_t size = 0;
  if (name->type_index == kTVMFFIRawStr) {
    data = name->v_c_str;
    size = strlen(data);
  } else if (name->type_index == kTVMFFISmallStr) {
    data = name->v_bytes;
    size = name->small_str_len;
  } else if (name->type_index == kTVMFFIStr) {
    const TVMFFIByteArray *bytes = (const TVMFFIByteArray *)((const char *)name->v_obj + sizeof(TVMFFIObject));
    data = bytes->data;
    size = bytes->size;
  }
  if (data == NULL || memchr(data, '/', size) != NULL || strlen(folder) + size + 2 > PATH_MAX) {
    ffi.raise("ValueError", "a file is sent under a plain name");
    return -1;
  }
  sprintf(path, "%s/%.*s", folder, (int)size, data);
  return 0;
}

static int work_path(void *self, const TVMFFIAny *arguments, int32_t count, TVMFFIAny *result) {
  char path[PATH_MAX];
  (void)self;
  if (count != 1 || path_of(arguments, path) != 0) return -1;
  TVMFFIByteArray bytes = {path, strlen(path)};
  return ffi.make_string(&bytes, result);
}

static int load_module(void *self, const TVMFFIAny *arguments, int32_t count, TVMFFIAny *result) {
  char path[PATH_MAX];
  (void)self;
  if (count != 1 || path_of(arguments, path) != 0) return -1;
  TVMFFIAny file = {.type_index = kTVMFFIRawStr, .v_c_str = path};
  return ffi.call(global_function("ffi.ModuleLoadFromFile"), &file, 1, result);
}

static void load_runtime(void) {
  void *library = open_beside("libtvm_ffi.so");
  *(void **)&ffi.get_global = must_find(library, "TVMFFIFunctionGetGlobal");
  *(void **)&ffi.set_global = must_find(library, "TVMFFIFunctionSetGlobal");
  *(void **)&ffi.create = must_find(library, "TVMFFIFunctionCreate");
  *(void **)&ffi.call = must_find(library, "TVMFFIFunctionCall");
  *(void **)&ffi.make_string = must_find(library, "TVMFFIStringFromByteArray");
  *(void **)&ffi.raise = must_find(library, "TVMFFIErrorSetRaisedFromCStr");
  open_beside("libtvm_runtime.so");
  serve_as("tvm.rpc.server.workpath", work_path);
  serve_as("tvm.rpc.server.load_module", load_module);
}

/* ---- sessions ---- */

static int read_all(int connection, void *data, size_t size) {
  return recv(connection, data, size, MSG_WAITALL) == (ssize_t)size;
}

static int write_all(int connection, const void *data, size_t size) {
  return send(connection, data, size, MSG_NOSIGNAL) == (ssize_t)size;
}

/* Whether a client of TVM's with the right key is there: "client:KEY", and options after a space. */
static int shake_hands(int connection, const char *key) {
  int32_t magic = 0, length = 0;
  char header[MAX_HEADER + 1], said[MAX_HEADER];
  if (!read_all(connection, &magic, 4) || magic != MAGIC || !read_all(connection, &length, 4)) return 0;
  if (length < 0 || length > MAX_HEADER || !read_all(connection, header, (size_t)length)) return 0;
  header[length] = '\0';
  header[strcspn(header, " ")] = '\0';
  int32_t answer = strncmp(header, "client:", 7) == 0 && strcmp(header + 7, key) == 0 ? MAGIC : MISMATCH;
  if (!write_all(connection, &answer, 4) || answer != MAGIC) return 0;
  length = snprintf(said, sizeof said, "server:%s", key);
  return write_all(connection, &length, 4) && write_all(connection, said, (size_t)length);
}

static void serve(int connection) {
  load_runtime();
  if (chdir(folder) != 0) fail("cannot enter %s: %s", folder, strerror(errno));
  TVMFFIAny socket_number = {.type_index = kTVMFFIInt, .v_int64 = connection}, result = {.type_index = kTVMFFINone};
  int code = ffi.call(global_function("rpc.ServerLoop"), &socket_number, 1, &result);
  fflush(NULL);
  _exit(code == 0 ? 0 : 1); /* not exit(): the runtime's worker threads may still be alive */
}

/* Each session in a child process: one that crashes or is killed takes nothing with it. */
static void serve_in_child(int connection, int listening) {
  snprintf(folder, sizeof folder, "%s/modelforge-rpc-XXXXXX", getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp");
  if (mkdtemp(folder) == NULL) fail("cannot make a folder like %s: %s", folder, strerror(errno));
  pid_t child = fork();
  if (child < 0) fail("cannot fork: %s", strerror(errno));
  if (child == 0) {
    close(listening);
    serve(connection);
  }
  int status = 0;
  waitpid(child, &status, 0);
  if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) fprintf(stderr, "rpc_server: the session ended with a fault\n");
  pid_t cleaner = fork();
  if (cleaner == 0) {
    execlp("rm", "rm", "-rf", "--", folder, (char *)NULL);
    _exit(1);
  }
  waitpid(cleaner, &status, 0);
}

int main(int count, char **words) {
  struct sockaddr_in address = {.sin_family = AF_INET};
  socklen_t size = sizeof address;
  int one = 1;
  char *end = NULL;
  if (count != 4) {
    fputs("usage: rpc_server HOST PORT KEY\n", stderr);
    return 2;
  }
  long port = strtol(words[2], &end, 10);
  if (*end != '\0' || port < 0 || port > 65535 || strlen(words[3]) > MAX_HEADER / 2 || strchr(words[3], ' ') != NULL ||
      inet_pton(AF_INET, words[1], &address.sin_addr) != 1) {
    fputs("rpc_server: HOST is an IPv4 address, PORT a number up to 65535, KEY a word\n", stderr);
    return 2;
  }
  address.sin_port = htons((uint16_t)port);
  int listening = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (listening < 0 || setsockopt(listening, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one) != 0 ||
      bind(listening, (struct sockaddr *)&address, size) != 0 || listen(listening, 8) != 0 ||
      getsockname(listening, (struct sockaddr *)&address, &size) != 0)
    fail("cannot listen on %s:%ld: %s", words[1], port, strerror(errno));
  printf("listening on %d\n", ntohs(address.sin_port));
  fflush(stdout);
  for (;;) {
    int connection = accept(listening, NULL, NULL);
    if (connection < 0) continue;
    struct timeval patience = {.tv_sec = 10};
    struct timeval forever = {0};
    setsockopt(connection, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    setsockopt(connection, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    if (shake_hands(connection, words[3])) {
      setsockopt(connection, SOL_SOCKET, SO_RCVTIMEO, &forever, sizeof forever);
      serve_in_child(connection, listening);
    }
    close(connection);
  }
}
