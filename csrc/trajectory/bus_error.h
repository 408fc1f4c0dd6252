// What happens when a mapped file cannot be read.
#pragma once

#include <string>

namespace pyard::trajectory {

// From now on a read of mapped memory that fails (SIGBUS: the disk has an error there, or the file became shorter) ends
// the process with one line on standard error, which begins with `program` and names the file, and with status 2.
void exit_on_bus_errors(const std::string& program);

}  // namespace pyard::trajectory
