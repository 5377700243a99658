#include "corpus.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string_view>

namespace {

namespace fs = std::filesystem;

// More of a domain than a demo's steps can read adds nothing but start-up time.
constexpr std::size_t kDomainBytes = 4'000'000;
constexpr std::size_t kShortest = 20'000;
constexpr std::size_t kHeldOutShare = 10;  // one in ten

std::string read_file(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) throw std::runtime_error("cannot read " + path.string());
  return {std::istreambuf_iterator<char>(in), {}};
}

std::string read_command(const char* command) {
  const std::unique_ptr<FILE, int (*)(FILE*)> pipe(popen(command, "r"), pclose);
  std::string text;
  std::array<char, 65536> chunk;
  while (pipe) {
    const std::size_t size = std::fread(chunk.data(), 1, chunk.size(), pipe.get());
    if (size == 0) break;
    text.append(chunk.data(), size);
  }
  return text;
}

/// All files under `root` whose names satisfy `wanted`, joined in the order of their paths.
template <typename Wanted>
std::string read_tree(const fs::path& root, Wanted wanted) {
  std::vector<fs::path> paths;
  std::error_code error;
  for (fs::recursive_directory_iterator file(root, error), end; !error && file != end;
       file.increment(error)) {
    if (file->is_regular_file() && wanted(file->path())) paths.push_back(file->path());
  }
  std::sort(paths.begin(), paths.end());
  std::string text;
  for (const fs::path& path : paths) {
    if (text.size() >= kDomainBytes) break;
    text += read_file(path);
  }
  return text;
}

/// The newest directory of the form root/<version>.
fs::path newest(const fs::path& root) {
  fs::path best;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(root, error)) {
    const fs::path name = entry.path().filename();
    if (entry.is_directory() && std::isdigit(static_cast<unsigned char>(name.string()[0])) != 0 &&
        entry.path() > best) {
      best = entry.path();
    }
  }
  return best;
}

Domain make_domain(std::string name, std::string text, const std::string& where) {
  if (text.size() < kShortest) {
    throw std::runtime_error(name + ": " + std::to_string(text.size()) + " bytes of text, needs " +
                             std::to_string(kShortest) + ": " + where);
  }
  text.resize(std::min(text.size(), kDomainBytes));
  const std::size_t split = text.size() - text.size() / kHeldOutShare;
  return {std::move(name), text.substr(0, split), text.substr(split)};
}

/// splitmix64 (Steele et al. 2014): a hash good enough to be a counter-based generator.
std::uint64_t mix(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

double unit(std::uint64_t bits) {
  return static_cast<double>(bits >> 11) * 0x1p-53;
}

void append(Batch& batch, const std::string& text, std::size_t start, std::int64_t domain) {
  for (std::int64_t i = 0; i <= batch.length; ++i) {
    batch.bytes.push_back(static_cast<unsigned char>(text[start + static_cast<std::size_t>(i)]));
  }
  batch.domains.push_back(domain);
  ++batch.sequences;
}

}  // namespace

std::vector<Domain> system_domains() {
  const auto extension = [](std::string_view wanted) {
    return [wanted](const fs::path& path) { return path.extension() == wanted; };
  };
  const auto header = [](const fs::path& path) {
    return path.extension() == ".h" || path.extension() == ".tcc" || path.extension().empty();
  };
  std::vector<Domain> domains;
  domains.push_back(
      make_domain("cpp", read_tree(newest("/usr/include/c++"), header), "install libstdc++-dev"));
  domains.push_back(make_domain("perl", read_tree("/usr/share/perl", extension(".pod")), "install perl-doc"));
  std::string modules;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator("/usr/share", error)) {
    if (entry.path().filename().string().starts_with("cmake-")) modules = entry.path().string();
  }
  domains.push_back(make_domain("cmake", read_tree(modules, extension(".cmake")), "install cmake"));
  domains.push_back(make_domain("scripture", read_command("bible gen1:1-rev22:21 </dev/null 2>/dev/null"),
                                "install bible-kjv"));
  return domains;
}

std::vector<Domain> file_domains(const std::vector<std::string>& paths) {
  std::vector<Domain> domains;
  for (const std::string& path : paths) {
    domains.push_back(
        make_domain(fs::path(path).filename().string(), read_file(path), path + " is too short"));
  }
  return domains;
}

Batch training_batch(const std::vector<Domain>& domains, const std::vector<double>& mixture,
                     std::uint64_t seed, std::int64_t step, std::int64_t sequences, std::int64_t length) {
  Batch batch;
  batch.length = length;
  for (std::int64_t i = 0; i < sequences; ++i) {
    const std::uint64_t key =
        mix(mix(mix(seed) ^ static_cast<std::uint64_t>(step)) ^ static_cast<std::uint64_t>(i));
    double left = unit(key);
    std::size_t domain = 0;
    while (domain + 1 < domains.size() && left >= mixture[domain]) left -= mixture[domain++];
    const std::string& text = domains[domain].train;
    const auto places = static_cast<double>(text.size() - static_cast<std::size_t>(length));
    append(batch, text, static_cast<std::size_t>(unit(mix(key)) * places), static_cast<std::int64_t>(domain));
  }
  return batch;
}

Batch validation_set(const std::vector<Domain>& domains, std::int64_t per_domain, std::int64_t length) {
  Batch batch;
  batch.length = length;
  for (std::int64_t i = 0; i < per_domain; ++i) {
    for (std::size_t d = 0; d < domains.size(); ++d) {
      const std::string& text = domains[d].held_out;
      const std::size_t places = text.size() - static_cast<std::size_t>(length) - 1;
      append(batch, text, places * static_cast<std::size_t>(i) / static_cast<std::size_t>(per_domain),
             static_cast<std::int64_t>(d));
    }
  }
  return batch;
}
