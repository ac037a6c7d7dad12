// Counts events by name, and hands the counts to Python.
#include "stub.h"
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

static std::mutex mutex;
static std::map<std::string, long> counts;
static bool is_counting = false;
static long launches = 0;  // and copies, since counting was turned on

void count(const char* kind, const std::string& name) {
  if (!is_counting) return;
  std::lock_guard<std::mutex> lock(mutex);
  launches += *kind == 'l' || *kind == 'c';
  ++counts[std::string(kind) + "\t" + name];
}

// For what build.py writes.
ANSWER(void) rehearsal_unanswered(const char* name) { count("other", name); }
ANSWER(void) rehearsal_launched(const char* name) { count("launch", name); }

// Begins to count anew, or stops.
ANSWER(void) rehearsal_count(int on) {
  std::lock_guard<std::mutex> lock(mutex);
  is_counting = on;
  if (on) counts.clear(), launches = 0;
}

ANSWER(long) rehearsal_launches() { return launches; }

// A line "number TAB kind TAB name" for each event, into a buffer of `size` bytes. Returns the bytes that are needed.
ANSWER(size_t) rehearsal_counts(char* buffer, size_t size) {
  std::lock_guard<std::mutex> lock(mutex);
  std::string text;
  for (const auto& [name, number] : counts) text += std::to_string(number) + "\t" + name + "\n";
  if (size > text.size()) memcpy(buffer, text.c_str(), text.size() + 1);
  return text.size() + 1;
}

void* new_handle() { return calloc(1, 64); }
