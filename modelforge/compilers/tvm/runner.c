/* Runs a compiled model (main.so) on the device: plain C, no Python, no C++ on our side.
 *
 *   ./run [options] MODEL.so NAME=FILE.npy ...
 *
 * The model library describes itself: it carries a text, printed by --describe (signature.py says how to read it).
 * It carries the weights too: they are used where the loader maps them, so that the pages are read when they are
 * needed, are never copied, and are shared by all processes that run this model.
 *
 * Arrays are NumPy .npy files, C order, little endian. The samples of an input lie along the first axis: a file has
 * the model's shape with its leading "*" or 1 replaced by the number of samples, else one more axis in front.
 * Outputs are written the same way, as 0.npy, 1.npy ... in the order of --describe. A batch that has no entry of its
 * own is filled up to the next larger one by repeating its last sample, and the surplus is cut off again.
 *
 * libtvm_ffi.so and libtvm_runtime.so are loaded from the folder that holds this program. TVM_NUM_THREADS sets the
 * number of threads, TVM_BIND_THREADS=0 leaves them to the kernel's scheduler; without the first, there are as many as
 * the target's profile has cores, or as this process may use if that is fewer; where it may not use all cores of the
 * machine (taskset), threads are not pinned. Ends with 0, with 1 after a failure,
 * with 2 after a wrong command line.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <errno.h>
#include <limits.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <tvm/ffi/c_api.h>

enum { MAX_TENSORS = 64, MAX_RANK = 12, MAX_ENTRIES = 32, MAX_NAME = 512, ALIGNMENT = 64 };

static const char USAGE[] =
    "usage: run [options] MODEL.so NAME=FILE.npy ...\n"
    "  -o FOLDER     where the outputs go, as 0.npy, 1.npy ... (default: the current folder)\n"
    "  -b N          samples per run (default: the largest entry of the model)\n"
    "  -r ROUNDS     run the first batch that often again, and print its latency, the time to load and the peak memory\n"
    "  -t SIZES      with -r: the same for these batch sizes, as 1,4,8: the first sample repeated\n"
    "  --describe    print the inputs, outputs and entries of the model\n";

typedef struct {
  const char *name;  /* NumPy's name */
  const char *descr; /* as in a .npy header */
  uint8_t code, bits;
} Kind;

static const Kind KINDS[] = {
    {"float32", "<f4", kDLFloat, 32}, {"float16", "<f2", kDLFloat, 16}, {"float64", "<f8", kDLFloat, 64},
    {"int8", "|i1", kDLInt, 8},       {"int16", "<i2", kDLInt, 16},     {"int32", "<i4", kDLInt, 32},
    {"int64", "<i8", kDLInt, 64},     {"uint8", "|u1", kDLUInt, 8},     {"uint16", "<u2", kDLUInt, 16},
    {"uint32", "<u4", kDLUInt, 32},   {"uint64", "<u8", kDLUInt, 64},   {"bool", "|b1", kDLBool, 8},
};

typedef struct {
  char name[MAX_NAME];
  const Kind *kind;
  int rank;
  int batched;              /* the leading dimension is the batch */
  int64_t shape[MAX_RANK];  /* the batch stands as 1 */
  size_t sample_bytes;
  FILE *file;
  char path[PATH_MAX];
  void *buffer;             /* inputs only: room for the largest entry */
} Tensor;

typedef struct {
  int64_t batch;
  TVMFFIObjectHandle function;
  TVMFFIAny *arguments; /* room for the inputs, then the weights */
  int argument_count;
} Entry;

typedef struct {
  DLManagedTensorVersioned view; /* of the library's own bytes */
  int64_t shape[MAX_RANK];
  TVMFFIObjectHandle handle;
} Weight;

typedef struct {
  Tensor inputs[MAX_TENSORS], outputs[MAX_TENSORS];
  Entry entries[MAX_ENTRIES];
  Weight **weights;
  int input_count, output_count, entry_count, weight_count;
  const char *weight_data;
  size_t weight_bytes;
} Model;

static void fail(int code, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  fputs("run: ", stderr);
  vfprintf(stderr, format, arguments);
  fputc('\n', stderr);
  va_end(arguments);
  fflush(NULL);
  _exit(code); /* not exit(): the runtime's worker threads may still be alive */
}

static double milliseconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec * 1e3 + (double)now.tv_nsec / 1e6;
}

/* ---- the runtime, found beside this program ---- */

static struct {
  int (*get_global)(const TVMFFIByteArray *, TVMFFIObjectHandle *);
  int (*call)(TVMFFIObjectHandle, TVMFFIAny *, int32_t, TVMFFIAny *);
  void (*move_error)(TVMFFIObjectHandle *);
  int (*from_dlpack)(DLManagedTensorVersioned *, int32_t, int32_t, TVMFFIObjectHandle *);
  int (*drop)(TVMFFIObjectHandle);
} ffi;

static void *must_find(void *library, const char *symbol) {
  void *address = dlsym(library, symbol);
  if (address == NULL) fail(1, "libtvm_ffi.so has no %s: it is of another version than this program", symbol);
  return address;
}

static void *open_beside(const char *name) {
  char path[PATH_MAX];
  ssize_t length = readlink("/proc/self/exe", path, sizeof path - 1);
  if (length <= 0) fail(1, "cannot read /proc/self/exe: %s", strerror(errno));
  path[length] = '\0';
  char *slash = strrchr(path, '/');
  if ((size_t)(slash - path) + strlen(name) + 2 > sizeof path) fail(1, "the path of this program is too long");
  strcpy(slash + 1, name);
  /* Global: the model library takes its symbols, and those of libm, from the process. */
  void *library = dlopen(path, RTLD_NOW | RTLD_GLOBAL);
  if (library == NULL) fail(1, "cannot load %s: %s", name, dlerror());
  return library;
}

static void load_runtime(void) {
  void *library = open_beside("libtvm_ffi.so");
  *(void **)&ffi.get_global = must_find(library, "TVMFFIFunctionGetGlobal");
  *(void **)&ffi.call = must_find(library, "TVMFFIFunctionCall");
  *(void **)&ffi.move_error = must_find(library, "TVMFFIErrorMoveFromRaised");
  *(void **)&ffi.from_dlpack = must_find(library, "TVMFFITensorFromDLPackVersioned");
  *(void **)&ffi.drop = must_find(library, "TVMFFIObjectDecRef");
  open_beside("libtvm_runtime.so");
}

static void *cell(TVMFFIObjectHandle object) { return (char *)object + sizeof(TVMFFIObject); }

static void fail_with_raised(const char *what) {
  TVMFFIObjectHandle error = NULL;
  ffi.move_error(&error);
  if (error == NULL) fail(1, "%s failed and gave no reason", what);
  const TVMFFIErrorCell *said = cell(error);
  fail(1, "%s: %.*s: %.*s", what, (int)said->kind.size, said->kind.data, (int)said->message.size, said->message.data);
}

static TVMFFIAny call(TVMFFIObjectHandle function, TVMFFIAny *arguments, int count, const char *what) {
  TVMFFIAny result = {.type_index = kTVMFFINone};
  if (ffi.call(function, arguments, count, &result) != 0) fail_with_raised(what);
  return result;
}

static TVMFFIAny integer(int64_t value) { return (TVMFFIAny){.type_index = kTVMFFIInt, .v_int64 = value}; }
static TVMFFIAny text(const char *value) { return (TVMFFIAny){.type_index = kTVMFFIRawStr, .v_c_str = value}; }
static TVMFFIAny object(TVMFFIObjectHandle handle) {
  return (TVMFFIAny){.type_index = ((TVMFFIObject *)handle)->type_index, .v_obj = handle};
}

static TVMFFIObjectHandle global_function(const char *name) {
  TVMFFIByteArray key = {name, strlen(name)};
  TVMFFIObjectHandle function = NULL;
  if (ffi.get_global(&key, &function) != 0 || function == NULL) fail(1, "the TVM runtime has no function %s", name);
  return function;
}

static TVMFFIObjectHandle member(TVMFFIObjectHandle module, const char *name) {
  TVMFFIAny arguments[] = {object(module), text(name), {.type_index = kTVMFFIBool, .v_int64 = 0}};
  TVMFFIAny found = call(global_function("ffi.ModuleGetFunction"), arguments, 3, name);
  if (found.type_index != kTVMFFIFunction) fail(1, "the model library has no function %s", name);
  return found.v_obj;
}

/* ---- the model ---- */

static size_t kind_bytes(const Kind *kind) { return kind->bits / 8; }

static const Kind *kind_named(const char *name) {
  for (size_t i = 0; i < sizeof KINDS / sizeof *KINDS; i++)
    if (strcmp(KINDS[i].name, name) == 0) return &KINDS[i];
  fail(1, "the model has a tensor of type %s, which this program does not know", name);
  return NULL;
}

/* Reads "float32 4 * 3 48 192": type, rank, shape, "*" being 1. Gives what follows, and the bytes of it all. */
static const char *parse_shape(const char *line, const Kind **kind, int *rank, int64_t *shape, int *batched, size_t *bytes) {
  const char *whole = line;
  char word[32];
  int read = 0;
  if (sscanf(line, "%31s %d%n", word, rank, &read) != 2 || *rank < 0 || *rank > MAX_RANK)
    fail(1, "the model's description cannot be read: %s", whole);
  *kind = kind_named(word);
  *bytes = kind_bytes(*kind);
  for (int i = 0; i < *rank; i++) {
    line += read;
    if (sscanf(line, "%31s%n", word, &read) != 1) fail(1, "the model's description ends too soon: %s", whole);
    *batched |= word[0] == '*';
    shape[i] = word[0] == '*' ? 1 : strtoll(word, NULL, 10);
    *bytes *= (size_t)shape[i];
  }
  return line + read;
}

static void parse_tensor(Tensor *tensor, const char *line) {
  line = parse_shape(line, &tensor->kind, &tensor->rank, tensor->shape, &tensor->batched, &tensor->sample_bytes);
  snprintf(tensor->name, sizeof tensor->name, "%s", line + 1);
}

static void *more(void *array, int count, size_t size) { /* room for one more, doubled when it is full */
  if ((count & (count - 1)) != 0) return array;
  array = realloc(array, size * (size_t)(count == 0 ? 1 : 2 * count));
  if (array == NULL) fail(1, "out of memory");
  return array;
}

/* Without a deleter: what is viewed lives as long as the process. */
static TVMFFIObjectHandle tensor_over(DLManagedTensorVersioned *view, void *data, const Kind *kind, int rank, int64_t *shape) {
  *view = (DLManagedTensorVersioned){
      .version = {DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION},
      .dl_tensor = {.data = data,
                    .device = {kDLCPU, 0},
                    .ndim = rank,
                    .dtype = {kind->code, kind->bits, 1},
                    .shape = shape},
  };
  TVMFFIObjectHandle handle = NULL;
  if (ffi.from_dlpack(view, ALIGNMENT, 1, &handle) != 0) fail_with_raised("handing over a tensor");
  return handle;
}

/* One line "960 float32 4 1 7 7 64": where it begins, then its type and shape. */
static void parse_weight(Model *model, const char *line) {
  Weight *weight = calloc(1, sizeof *weight);
  char *rest = NULL;
  const Kind *kind = NULL;
  int rank = 0, batched = 0;
  size_t bytes = 0, offset = strtoull(line, &rest, 10);
  if (weight == NULL) fail(1, "out of memory");
  parse_shape(rest, &kind, &rank, weight->shape, &batched, &bytes);
  if (offset > model->weight_bytes || bytes > model->weight_bytes - offset)
    fail(1, "the model's description names a weight beyond the %zu bytes of weights: %s", model->weight_bytes, line);
  weight->handle = tensor_over(&weight->view, (void *)(model->weight_data + offset), kind, rank, weight->shape);
  model->weights = more(model->weights, model->weight_count, sizeof *model->weights);
  model->weights[model->weight_count++] = weight;
}

static void check_weights(Model *model, const char *line) {
  if (strtoull(line, NULL, 10) != model->weight_bytes)
    fail(1, "the model library holds %zu bytes of weights, its description says %s", model->weight_bytes, line);
}

/* One line "4 main_b4 0 1 2": the batch, the function, and which weights it takes after its inputs. */
static void parse_entry(Model *model, const char *line, TVMFFIObjectHandle machine) {
  if (model->entry_count == MAX_ENTRIES) fail(1, "the model has more than %d entries", MAX_ENTRIES);
  Entry *entry = &model->entries[model->entry_count++];
  char name[MAX_NAME];
  int read = 0;
  long long batch = 0;
  if (sscanf(line, "%lld %511s%n", &batch, name, &read) != 2 || batch < 1)
    fail(1, "the model's description cannot be read: entry %s", line);
  entry->batch = batch;
  entry->function = member(machine, name);
  entry->argument_count = model->input_count;
  entry->arguments = calloc((size_t)model->input_count + strlen(line), sizeof *entry->arguments); /* more than there are */
  if (entry->arguments == NULL) fail(1, "out of memory");
  for (char *rest = NULL, *at = (char *)line + read; *at != '\0'; at = rest) {
    long row = strtol(at, &rest, 10);
    if (rest == at || row < 0 || row >= model->weight_count) fail(1, "the model's description names no such weight: %s", at);
    entry->arguments[entry->argument_count++] = object(model->weights[row]->handle);
  }
}

/* Before the runtime looks: it reads the environment when it first starts threads. */
static void set_threads(const char *line) {
  cpu_set_t set;
  long threads = strtol(line, NULL, 10), usable = threads;
  char number[24];
  if (sched_getaffinity(0, sizeof set, &set) == 0) usable = CPU_COUNT(&set);
  snprintf(number, sizeof number, "%ld", usable < threads ? usable : threads < 1 ? 1 : threads);
  setenv("TVM_NUM_THREADS", number, 0);
  /* Its pinning knows nothing of the cores that this process was given, and would leave them. */
  if (usable < sysconf(_SC_NPROCESSORS_ONLN)) setenv("TVM_BIND_THREADS", "0", 0);
}

static Tensor *next_tensor(Tensor *tensors, int *count) {
  if (*count == MAX_TENSORS) fail(1, "the model has more than %d inputs or outputs", MAX_TENSORS);
  return &tensors[(*count)++];
}

static const char HEADER[] = "modelforge-tvm 2";

static void parse_description(Model *model, char *description, TVMFFIObjectHandle machine) {
  char *rest = NULL;
  char *line = strtok_r(description, "\n", &rest);
  if (line == NULL || strcmp(line, HEADER) != 0)
    fail(1, "the model describes itself as \"%s\", this program reads \"%s\": they are of different versions, take both "
            "from one variant", line == NULL ? "" : line, HEADER);
  while ((line = strtok_r(NULL, "\n", &rest)) != NULL) {
    if (strncmp(line, "input ", 6) == 0) parse_tensor(next_tensor(model->inputs, &model->input_count), line + 6);
    else if (strncmp(line, "output ", 7) == 0) parse_tensor(next_tensor(model->outputs, &model->output_count), line + 7);
    else if (strncmp(line, "weights ", 8) == 0) check_weights(model, line + 8);
    else if (strncmp(line, "weight ", 7) == 0) parse_weight(model, line + 7);
    else if (strncmp(line, "entry ", 6) == 0) parse_entry(model, line + 6, machine);
    else if (strncmp(line, "threads ", 8) == 0) set_threads(line + 8);
    else fail(1, "the model's description has a line that this program does not know: %s", line);
  }
  if (model->entry_count == 0) fail(1, "the model has no entry");
}

/* A file that was cut off is mapped without complaint, and ends in a bus error when the missing part is read: the
 * table of sections is its last part. */
static void check_whole(const char *path) {
  Elf64_Ehdr header;
  FILE *file = fopen(path, "rb");
  if (file == NULL) fail(1, "cannot open %s: %s", path, strerror(errno));
  size_t read = fread(&header, 1, sizeof header, file);
  if (read != sizeof header || memcmp(header.e_ident, ELFMAG, SELFMAG) != 0 || header.e_ident[EI_CLASS] != ELFCLASS64)
    fail(1, "%s is not a model library", path);
  uint64_t end = header.e_shoff + (uint64_t)header.e_shnum * header.e_shentsize;
  fseeko(file, 0, SEEK_END);
  uint64_t size = (uint64_t)ftello(file);
  if (size < end)
    fail(1, "%s is cut off: %llu bytes of %llu", path, (unsigned long long)size, (unsigned long long)end);
  fclose(file);
}

static void *part(void *library, const char *path, const char *symbol) {
  void *address = dlsym(library, symbol);
  if (address == NULL) fail(1, "%s does not describe itself: ModelForge did not make it", path);
  return address;
}

/* Gives a copy of the description, and where the weights lie. */
static char *open_library(const char *path, Model *model) {
  check_whole(path);
  void *library = dlopen(path, RTLD_LAZY | RTLD_LOCAL);
  if (library == NULL) fail(1, "cannot load the model library: %s", dlerror());
  const char *begin = part(library, path, "_binary_signature_txt_start");
  const char *end = part(library, path, "_binary_signature_txt_end");
  char *description = strndup(begin, (size_t)(end - begin));
  if (description == NULL) fail(1, "out of memory");
  if (strncmp(description, HEADER, strlen(HEADER)) != 0) return description; /* refused by its first line */
  model->weight_data = part(library, path, "_binary_weights_bin_start");
  model->weight_bytes = (size_t)((const char *)part(library, path, "_binary_weights_bin_end") - model->weight_data);
  uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), first = (uintptr_t)model->weight_data / page * page;
  /* Reading ahead while the rest is set up; only a wish. */
  madvise((void *)first, model->weight_bytes + ((uintptr_t)model->weight_data - first), MADV_WILLNEED);
  return description;
}

static TVMFFIObjectHandle load_machine(const char *path) {
  TVMFFIAny file = text(path);
  TVMFFIAny library = call(global_function("ffi.ModuleLoadFromFile"), &file, 1, path);
  TVMFFIAny machine = call(member(library.v_obj, "vm_load_executable"), NULL, 0, "loading the executable");
  TVMFFIAny setting[] = {integer(kDLCPU), integer(0), integer(2)}; /* device, its number, pooled allocator */
  call(member(machine.v_obj, "vm_initialization"), setting, 3, "initialising the executable");
  return machine.v_obj;
}

/* ---- .npy files (numpy.lib.format, versions 1 to 3) ---- */

/* Opens an input, checks it against the model, and gives the number of its samples. */
static int64_t open_input(Tensor *tensor) {
  unsigned char start[12];
  char header[4096], descr[16];
  int64_t shape[MAX_RANK + 1];
  int rank = 0;
  tensor->file = fopen(tensor->path, "rb");
  if (tensor->file == NULL) fail(1, "input %s: cannot open %s: %s", tensor->name, tensor->path, strerror(errno));
  if (fread(start, 1, 10, tensor->file) != 10 || memcmp(start, "\x93NUMPY", 6) != 0)
    fail(1, "input %s: %s is not an .npy file", tensor->name, tensor->path);
  size_t length = start[8] | (size_t)start[9] << 8;
  if (start[6] >= 2) { /* from version 2 on, the length has four bytes */
    if (fread(start + 10, 1, 2, tensor->file) != 2) fail(1, "input %s: %s ends too soon", tensor->name, tensor->path);
    length |= (size_t)start[10] << 16 | (size_t)start[11] << 24;
  }
  if (length >= sizeof header || fread(header, 1, length, tensor->file) != length)
    fail(1, "input %s: the header of %s cannot be read", tensor->name, tensor->path);
  header[length] = '\0';
  const char *at = strstr(header, "'descr':");
  if (at == NULL || sscanf(at, "'descr': '%15[^']'", descr) != 1 || strstr(header, "'fortran_order': False") == NULL)
    fail(1, "input %s: %s is not an array in C order", tensor->name, tensor->path);
  if (strcmp(descr, tensor->kind->descr) != 0)
    fail(1, "input %s: %s holds %s, the model takes %s", tensor->name, tensor->path, descr, tensor->kind->descr);
  at = strstr(header, "'shape': (");
  for (at = at == NULL ? ")" : at + 10; *at != ')' && *at != '\0' && rank <= MAX_RANK; rank++) {
    char *end = NULL;
    shape[rank] = strtoll(at, &end, 10);
    if (end == at) break;
    at = end + strspn(end, ", ");
  }
  int leading = tensor->rank > 0 && (tensor->batched || tensor->shape[0] == 1);
  int64_t samples = rank > 0 ? shape[0] : 1;
  int fits = leading ? rank == tensor->rank : rank == tensor->rank + 1;
  for (int i = leading; fits && i < tensor->rank; i++) fits = shape[leading ? i : i + 1] == tensor->shape[i];
  if (!fits && !leading && rank == tensor->rank) { /* one sample, without an axis for samples */
    samples = 1;
    fits = memcmp(shape, tensor->shape, sizeof *shape * (size_t)rank) == 0;
  }
  if (!fits) fail(1, "input %s: the shape in %s does not fit the model (see --describe)", tensor->name, tensor->path);
  return samples;
}

static void open_output(Tensor *tensor, int position, const char *folder, int64_t samples) {
  char header[1024];
  int leading = tensor->rank > 0 && (tensor->batched || tensor->shape[0] == 1);
  if ((size_t)snprintf(tensor->path, sizeof tensor->path, "%s/%d.npy", folder, position) >= sizeof tensor->path)
    fail(1, "the path of the output folder is too long");
  tensor->file = fopen(tensor->path, "wb");
  if (tensor->file == NULL) fail(1, "output %s: cannot write %s: %s", tensor->name, tensor->path, strerror(errno));
  int length = sprintf(header, "{'descr': '%s', 'fortran_order': False, 'shape': (%lld,", tensor->kind->descr,
                       (long long)samples);
  for (int i = leading; i < tensor->rank; i++) length += sprintf(header + length, " %lld,", (long long)tensor->shape[i]);
  length += sprintf(header + length, "), }");
  while ((length + 1 + 10) % ALIGNMENT != 0) header[length++] = ' '; /* the data begin at a multiple of 64 */
  header[length++] = '\n';
  const unsigned char start[] = {0x93, 'N', 'U', 'M', 'P', 'Y', 1, 0, (unsigned char)length, (unsigned char)(length >> 8)};
  fwrite(start, 1, sizeof start, tensor->file);
  fwrite(header, 1, (size_t)length, tensor->file);
}

/* ---- running ---- */

static TVMFFIAny run_once(const Model *model, const Entry *entry) {
  static DLManagedTensorVersioned views[MAX_TENSORS];
  static int64_t shapes[MAX_TENSORS][MAX_RANK];
  for (int i = 0; i < model->input_count; i++) {
    const Tensor *tensor = &model->inputs[i];
    memcpy(shapes[i], tensor->shape, sizeof shapes[i]);
    if (tensor->batched) shapes[i][0] = entry->batch;
    entry->arguments[i] = object(tensor_over(&views[i], tensor->buffer, tensor->kind, tensor->rank, shapes[i]));
  }
  TVMFFIAny result = call(entry->function, entry->arguments, entry->argument_count, "running the model");
  for (int i = 0; i < model->input_count; i++) ffi.drop(entry->arguments[i].v_obj);
  return result;
}

static void write_output(Tensor *expected, TVMFFIObjectHandle handle, int64_t batch, int64_t samples) {
  const DLTensor *tensor = cell(handle);
  size_t bytes = kind_bytes(expected->kind);
  for (int i = 0; i < tensor->ndim; i++) bytes *= (size_t)tensor->shape[i];
  if (tensor->dtype.bits != expected->kind->bits || bytes != expected->sample_bytes * (size_t)(expected->batched ? batch : 1))
    fail(1, "output %s has another size than the model's description says", expected->name);
  bytes = expected->sample_bytes * (size_t)(expected->batched ? samples : 1);
  if (fwrite((const char *)tensor->data + tensor->byte_offset, 1, bytes, expected->file) != bytes)
    fail(1, "output %s: cannot write %s: %s", expected->name, expected->path, strerror(errno));
}

static void write_outputs(Model *model, TVMFFIAny result, const Entry *entry, int64_t samples) {
  if (result.type_index == kTVMFFITensor) {
    write_output(&model->outputs[0], result.v_obj, entry->batch, samples);
    return;
  }
  TVMFFIObjectHandle get_item = global_function("ffi.ArrayGetItem");
  for (int i = 0; i < model->output_count; i++) {
    TVMFFIAny arguments[] = {result, integer(i)};
    TVMFFIAny item = call(get_item, arguments, 2, "reading the outputs");
    write_output(&model->outputs[i], item.v_obj, entry->batch, samples);
    ffi.drop(item.v_obj);
  }
  ffi.drop(get_item);
}

static void read_samples(Tensor *tensor, int64_t samples, int64_t room) {
  size_t wanted = tensor->sample_bytes * (size_t)samples;
  if (fread(tensor->buffer, 1, wanted, tensor->file) != wanted)
    fail(1, "input %s: %s ends too soon", tensor->name, tensor->path);
  char *last = (char *)tensor->buffer + tensor->sample_bytes * (size_t)(samples - 1);
  for (int64_t i = samples; tensor->batched && i < room; i++)
    memcpy((char *)tensor->buffer + tensor->sample_bytes * (size_t)i, last, tensor->sample_bytes);
}

static int rising(const void *a, const void *b) {
  double left = *(const double *)a, right = *(const double *)b;
  return (left > right) - (left < right);
}

/* Of this program alone: what getrusage() gives is that of the process that started it, if that was larger. */
static long long peak_memory(void) {
  char line[256];
  long long kilobytes = 0;
  FILE *file = fopen("/proc/self/status", "r");
  while (file != NULL && fgets(line, sizeof line, file) != NULL)
    if (sscanf(line, "VmHWM: %lld kB", &kilobytes) == 1) break;
  if (file != NULL) fclose(file);
  return kilobytes * 1024;
}

static const Entry *entry_for(const Model *model, int64_t samples) {
  for (int i = 0; i < model->entry_count; i++) /* they rise */
    if (model->entries[i].batch >= samples) return &model->entries[i];
  return &model->entries[model->entry_count - 1];
}

/* Rising times of `rounds` runs. */
static void take_times(const Model *model, const Entry *entry, long rounds, double *times) {
  for (long i = 0; i < rounds; i++) {
    double begun = milliseconds();
    TVMFFIAny result = run_once(model, entry);
    times[i] = milliseconds() - begun;
    ffi.drop(result.v_obj);
  }
  qsort(times, (size_t)rounds, sizeof *times, rising);
}

static void repeat_first(Model *model, int64_t room) {
  for (int i = 0; i < model->input_count; i++) {
    Tensor *tensor = &model->inputs[i];
    for (int64_t at = 1; tensor->batched && at < room; at++)
      memcpy((char *)tensor->buffer + tensor->sample_bytes * (size_t)at, tensor->buffer, tensor->sample_bytes);
  }
}

/* Prints one line of JSON. `sizes` is a list such as "1,4,8", or NULL. */
static void measure(Model *model, const Entry *entry, long rounds, const char *sizes, double load, double first) {
  double *times = malloc(sizeof *times * (size_t)rounds);
  if (times == NULL) fail(1, "out of memory");
  take_times(model, entry, rounds, times);
  TVMFFIAny threads = call(global_function("runtime.NumThreads"), NULL, 0, "counting threads");
  printf("{\"batch\": %lld, \"rounds\": %ld, \"threads\": %lld, \"min_ms\": %.4f, \"p50_ms\": %.4f, \"p90_ms\": %.4f, "
         "\"p99_ms\": %.4f, \"load_ms\": %.4f, \"first_ms\": %.4f",
         (long long)entry->batch, rounds, (long long)threads.v_int64, times[0], times[rounds / 2], times[rounds * 9 / 10],
         times[rounds * 99 / 100], load, first);
  for (const char *at = sizes, *next = NULL; at != NULL && *at != '\0'; at = *next == ',' ? next + 1 : next) {
    long size = strtol(at, (char **)&next, 10);
    const Entry *own = entry_for(model, size);
    repeat_first(model, own->batch);
    take_times(model, own, rounds, times);
    printf("%s\"%ld\": %.4f", at == sizes ? ", \"by_batch\": {" : ", ", size, times[rounds / 2]);
  }
  printf("%s, \"peak_rss_bytes\": %lld}\n", sizes == NULL ? "" : "}", peak_memory());
  free(times);
}

static void run_all(Model *model, int64_t samples, int64_t batch, long rounds, const char *sizes, double load) {
  for (int64_t done = 0; done < samples;) {
    int64_t now = samples - done < batch ? samples - done : batch;
    const Entry *entry = entry_for(model, now);
    for (int i = 0; i < model->input_count; i++) read_samples(&model->inputs[i], now, entry->batch);
    double begun = milliseconds();
    TVMFFIAny result = run_once(model, entry);
    double first = milliseconds() - begun;
    write_outputs(model, result, entry, now);
    ffi.drop(result.v_obj);
    if (done == 0 && rounds > 0) measure(model, entry, rounds, sizes, load, first);
    done += now;
  }
  for (int i = 0; i < model->output_count; i++)
    if (fclose(model->outputs[i].file) != 0)
      fail(1, "output %s: cannot write %s: %s", model->outputs[i].name, model->outputs[i].path, strerror(errno));
}

/* ---- the command line ---- */

static void name_input(Model *model, const char *argument) {
  for (int i = 0; i < model->input_count; i++) {
    Tensor *tensor = &model->inputs[i];
    size_t length = strlen(tensor->name);
    if (strncmp(argument, tensor->name, length) == 0 && argument[length] == '=') {
      snprintf(tensor->path, sizeof tensor->path, "%s", argument + length + 1);
      return;
    }
  }
  fail(2, "\"%s\" is not NAME=FILE.npy with the name of an input (see --describe)", argument);
}

static int64_t open_inputs(Model *model, int64_t room, int *one_by_one) {
  int64_t samples = -1;
  for (int i = 0; i < model->input_count; i++) {
    Tensor *tensor = &model->inputs[i];
    if (tensor->path[0] == '\0') fail(2, "input %s is missing: give %s=FILE.npy", tensor->name, tensor->name);
    int64_t here = open_input(tensor);
    if (samples >= 0 && here != samples) fail(1, "the inputs differ in their number of samples");
    samples = here;
    *one_by_one |= !tensor->batched;
    size_t bytes = tensor->sample_bytes * (size_t)(tensor->batched ? room : 1);
    tensor->buffer = aligned_alloc(ALIGNMENT, (bytes + ALIGNMENT) / ALIGNMENT * ALIGNMENT);
    if (tensor->buffer == NULL) fail(1, "out of memory for input %s", tensor->name);
  }
  if (samples == 0) fail(1, "the inputs hold no sample");
  return samples < 0 ? 1 : samples;
}

static long positive(const char *option, const char *value) {
  char *end = NULL;
  long number = value == NULL ? 0 : strtol(value, &end, 10);
  if (number <= 0 || *end != '\0') fail(2, "%s takes a number above zero", option);
  return number;
}

static void check_sizes(const char *sizes, int64_t largest) {
  for (const char *at = sizes, *next = NULL; at != NULL; at = *next == ',' ? next + 1 : NULL) {
    long size = strtol(at, (char **)&next, 10);
    if (next == at || size < 1 || size > largest || (*next != ',' && *next != '\0'))
      fail(2, "-t takes batch sizes from 1 to %lld, as 1,4,8", (long long)largest);
  }
}

int main(int argc, char **argv) {
  static Model model;
  double begun = milliseconds();
  const char *folder = ".", *sizes = NULL;
  int64_t batch = 0;
  long rounds = 0;
  int describe = 0, one_by_one = 0, at = 1;
  for (; at < argc && argv[at][0] == '-'; at++) {
    if (strcmp(argv[at], "--describe") == 0) {
      describe = 1;
      continue;
    }
    const char *option = argv[at], *value = at + 1 < argc ? argv[++at] : NULL;
    if (strcmp(option, "-o") == 0 && value != NULL) folder = value;
    else if (strcmp(option, "-b") == 0) batch = positive(option, value);
    else if (strcmp(option, "-r") == 0) rounds = positive(option, value);
    else if (strcmp(option, "-t") == 0 && value != NULL) sizes = value;
    else {
      fputs(USAGE, stderr);
      return 2;
    }
  }
  if (at >= argc) {
    fputs(USAGE, stderr);
    return 2;
  }
  load_runtime();
  char path[PATH_MAX]; /* with a slash, or the loader would search its own folders */
  snprintf(path, sizeof path, "%s%s", strchr(argv[at], '/') == NULL ? "./" : "", argv[at]);
  if (access(path, R_OK) != 0) fail(1, "cannot open %s: %s", argv[at], strerror(errno));
  char *description = open_library(path, &model);
  if (describe) {
    fputs(description, stdout);
    return 0;
  }
  parse_description(&model, description, load_machine(path));
  double load = milliseconds() - begun;
  for (int i = at + 1; i < argc; i++) name_input(&model, argv[i]);
  int64_t largest = model.entries[model.entry_count - 1].batch;
  int64_t samples = open_inputs(&model, largest, &one_by_one);
  if (batch > largest) fail(2, "-b %lld: the largest entry of the model takes %lld", (long long)batch, (long long)largest);
  check_sizes(sizes, largest);
  if (batch == 0) batch = largest;
  if (one_by_one) batch = 1; /* an input without a batch: each sample may have another value there */
  for (int i = 0; i < model.output_count; i++) open_output(&model.outputs[i], i, folder, samples);
  run_all(&model, samples, batch, rounds, sizes, load);
  fflush(NULL);
  _exit(0); /* no teardown: the runtime's threads and the pool are the kernel's to clean up */
}
