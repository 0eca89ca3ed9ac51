#include "signatures.h"

// A local static: made before the first of the other files' statics that adds to it.
std::string& signatures() {
    static std::string lines;
    return lines;
}

extern "C" const char* mhc_signatures() { return signatures().c_str(); }
