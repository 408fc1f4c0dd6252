#include "trajectory/bus_error.h"

#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstring>

namespace pyard::trajectory {
namespace {

// A signal handler may neither allocate nor lock, so all that it needs is here.
char g_program[256];
char g_line[8192];
std::atomic_flag g_entered = ATOMIC_FLAG_INIT;
struct sigaction g_before{};

void say(const char* text) {
  if (write(STDERR_FILENO, text, std::strlen(text)) < 0) _exit(2);
}

bool is_digit(char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); }

const char* read_hex(const char* text, uintptr_t* value) {
  for (*value = 0; is_digit(*text); ++text) {
    *value = *value * 16 + static_cast<uintptr_t>(*text <= '9' ? *text - '0' : *text - 'a' + 10);
  }
  return text;
}

// The path in a line "begin-end ..." of /proc/self/maps whose range holds `address`, or nullptr.
const char* path_at(const char* line, uintptr_t address) {
  uintptr_t begin = 0, end = 0;
  line = read_hex(line, &begin);
  if (*line != '-') return nullptr;
  line = read_hex(line + 1, &end);
  return begin <= address && address < end ? std::strchr(line, '/') : nullptr;
}

const char* mapped_path(uintptr_t address) {
  const int maps = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
  if (maps < 0) return nullptr;
  size_t length = 0;
  char c = 0;
  // Byte by byte: the process ends here, and nothing is simpler.
  while (read(maps, &c, 1) == 1) {
    if (c != '\n') {
      if (length + 1 < sizeof(g_line)) g_line[length++] = c;
      continue;
    }
    g_line[length] = '\0';
    length = 0;
    if (const char* path = path_at(g_line, address)) return path;
  }
  return nullptr;
}

void on_bus_error(int number, siginfo_t* info, void*) {
  if (info->si_code != BUS_ADRERR) {  // somebody's signal, or broken memory: not of a file
    sigaction(number, &g_before, nullptr);
    raise(number);
    return;
  }
  // Several threads may read from the same failing disk; the first one speaks for all.
  while (g_entered.test_and_set()) pause();
  const char* path = mapped_path(reinterpret_cast<uintptr_t>(info->si_addr));
  say(g_program);
  say(": error: ");
  if (path != nullptr && std::strncmp(path, "/dev/shm/", 9) == 0) {
    say("shared memory (/dev/shm) is full; enlarge it (for a container, with --shm-size) and rerun the same command\n");
    _exit(2);
  }
  say(path == nullptr ? "a mapped file" : path);
  say(" cannot be read (the disk has an error, or the file became shorter); check the disk and rerun the same "
      "command\n");
  _exit(2);
}

}  // namespace

void exit_on_bus_errors(const std::string& program) {
  std::strncpy(g_program, program.c_str(), sizeof(g_program) - 1);
  struct sigaction action{};
  action.sa_sigaction = on_bus_error;
  action.sa_flags = SA_SIGINFO;
  sigemptyset(&action.sa_mask);
  struct sigaction before{};
  sigaction(SIGBUS, &action, &before);
  if (before.sa_sigaction != on_bus_error) g_before = before;
}

}  // namespace pyard::trajectory
