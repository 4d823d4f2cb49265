package connpool

import (
	"errors"
	"fmt"
	"runtime/debug"
)

// What is said of foreign code (foreign.go) that did not return, panicked, or did what its
// contract forbids; and how its errors are made safe.

// lateError is the error for foreign code that has not returned in time. The pool goes
// on without it.
type lateError struct{ what string }

func (e *lateError) Error() string { return e.what + " did not return" }
func (e *lateError) Timeout() bool { return true }
func (*lateError) Temporary() bool { return false }

// isLate reports whether err is a lateError, or wraps one.
func isLate(err error) bool {
	var late *lateError
	return errors.As(err, &late)
}

// sanitizeError makes the error of foreign code safe to use, and removes the marks of Keep from
// it. Later the pool calls methods of the error with its books locked and on goroutines
// of its own, where a panic of a method would end the process. So sanitizeError calls these
// methods first, and replaces an error whose methods panic.
//
// If a method does not return, neither does sanitizeError; each caller has a bound for that.
func sanitizeError(err error) (safe error) {
	if err == nil {
		return nil
	}
	defer func() {
		if v := recover(); v != nil {
			safe = &brokenContract{fmt.Sprintf("an error of type %T, a method of which panicked: %s", err, panicText(v))}
		}
	}()
	KindOf(err)
	_ = err.Error()
	return spent(err)
}

// brokenContract is an error for foreign code that did what its contract forbids.
type brokenContract struct{ what string }

func (e *brokenContract) Error() string { return e.what }

// leftUnread is an error for foreign code that left bytes unread; it wraps ErrUnread.
type leftUnread struct{ broken *brokenContract }

func (e *leftUnread) Error() string   { return e.broken.what }
func (e *leftUnread) Unwrap() []error { return []error{e.broken, ErrUnread} }

// hookPanic says that the hook that has just run panicked itself. No other error may say so:
// the error that a hook returns may hold the PanicError of another pool, which is no panic
// of this hook. So the pool recognizes hookPanic by its type, never by errors.As.
type hookPanic struct{ pan *PanicError }

func (e *hookPanic) Error() string      { return e.pan.Error() }
func (e *hookPanic) Unwrap() error      { return e.pan }
func (e *hookPanic) As(target any) bool { return hideKeepMark(target) }

// returned is the error of foreign code that returned it. If the foreign code got the error
// from a pool, for example from CloseInfo.Err, a hookPanic in it is a panic of other code.
func returned(err error) error {
	if e, ok := err.(*hookPanic); ok {
		return e.pan
	}
	return err
}

// panicOf is the PanicError for foreign code that panicked with v, which was just recovered;
// or, if v is nil, that called runtime.Goexit.
func panicOf(where string, v any) *PanicError {
	e := &PanicError{Where: where}
	if v != nil {
		e.Value, e.Stack = v, debug.Stack()
	}
	if err, ok := v.(error); ok {
		e.cause = sanitizeError(err)
	}
	return e
}

// recoverInto turns a panic of foreign code into an error. It must be deferred.
func recoverInto(err *error, where string) {
	if v := recover(); v != nil {
		*err = &hookPanic{panicOf(where, v)}
	}
}

// recoverAt is recoverInto for code that updates *where as it goes on.
func recoverAt(err *error, where *string) {
	if v := recover(); v != nil {
		*err = &hookPanic{&PanicError{Where: *where, Value: v, Stack: debug.Stack()}}
	}
}

func isPanic(err error) bool {
	_, ok := err.(*hookPanic)
	return ok
}

// passOn panics again with the panic of a hook that ran for the caller.
func passOn(err error) {
	if e, ok := err.(*hookPanic); ok {
		panic(e.pan)
	}
}
