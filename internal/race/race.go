// Package race tells whether the race detector watches: what it makes slow, or
// allocates, some tests leave out. Only tests import it.
package race
