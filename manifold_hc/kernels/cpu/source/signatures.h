// Signatures of the exported functions, derived from their C++ types. Python checks its own
// declarations against them when it loads the library.
#pragma once

#include <cstdint>
#include <string>

template <class T>
struct Letter;
template <class T>
struct Letter<T*> {
    static constexpr char value = 'p';
};
template <>
struct Letter<int64_t> {
    static constexpr char value = 'i';
};
template <>
struct Letter<float> {
    static constexpr char value = 'f';
};
// The status that a function returns.
template <>
struct Letter<int> {
    static constexpr char value = 's';
};

// "name pppi->s", a line.
template <class Result, class... Arguments>
std::string signature_of(const char* name, Result (*)(Arguments...)) {
    const char letters[] = {Letter<Arguments>::value..., '\0'};
    return std::string(name) + ' ' + letters + "->" + Letter<Result>::value + '\n';
}

// Lines of all exported functions.
std::string& signatures();

struct Exported {
    explicit Exported(const std::string& line) { signatures() += line; }
};

// Stands after the definition of every exported function.
#define EXPORT(name) static const Exported name##_exported(signature_of(#name, &name))
