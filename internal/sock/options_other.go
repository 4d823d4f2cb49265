//go:build !(linux || darwin || dragonfly || freebsd || netbsd || openbsd || windows)

package sock

import "errors"

// Some of these systems have some of the options; none is claimed that no test
// has ever seen.
var socketsCan = capabilities{}

func setTrafficClass(uintptr, bool, int) error { return errors.ErrUnsupported }

func setUserTimeout(uintptr, int) error { return errors.ErrUnsupported }

func setSendBuffer(uintptr, int) error { return errors.ErrUnsupported }

func setRecvBuffer(uintptr, int) error { return errors.ErrUnsupported }
