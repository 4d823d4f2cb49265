package connpool

// Keep, and how far its word goes. A mark speaks for the connection of the use
// whose fn returned it. What With, Do or a use of a session returns goes on to
// somebody else, who may be inside an fn of his own: there the mark must say
// nothing, or the outer connection would be kept in the middle of an exchange.
// The mark itself cannot be told that it is spent, since it may be a variable of
// a package that is returned many times. So the error that leaves is put behind
// a spentError, at which isKept turns round; errors.Is and errors.As see through
// it to all but the mark.

// keepError is the verdict of [Keep].
type keepError struct {
	err   error
	spent bool // it is no mark, but what errors.As finds in the place of a spent one
}

func (k *keepError) Error() string { return k.err.Error() }
func (k *keepError) Unwrap() error { return k.err }

// Keep wraps the error of an exchange that went wrong for its own reasons and
// left the connection in step: a "no such key", a rejected request. fn returns
// Keep(err) to have err reported while the connection goes back to the pool. The
// mark may be wrapped, or joined with other errors. Keep(nil) is nil. It does not
// save a connection whose socket failed, that has unread or unflushed bytes, or
// whose ctx is done.
//
// A mark speaks for the connection of the fn that returns it, and for no other:
// in an error that a With or Do returned it has done its work, and an outer fn
// that returns this error gives its own connection up, unless it says Keep
// itself.
func Keep(err error) error {
	if err == nil {
		return nil
	}
	return &keepError{err: err}
}

// spentError is an error whose marks have had their say.
type spentError struct{ err error }

func (e *spentError) Error() string      { return e.err.Error() }
func (e *spentError) Unwrap() error      { return e.err }
func (e *spentError) As(target any) bool { return entomb(target) }

// entomb answers an As that looks for a mark, and would go on to one that is
// spent. It is for the wrappers of others, which isKept can only ask by As.
func entomb(target any) bool {
	k, ok := target.(**keepError)
	if ok {
		*k = &keepError{spent: true}
	}
	return ok
}

// isKept reports whether err, which an fn has returned, has a mark of this fn's.
// Of the pool's own errors none has: what is in them came from elsewhere, from a
// Setup, the cause of a ctx, another use.
func isKept(err error) bool {
	for err != nil {
		switch e := err.(type) {
		case *keepError:
			return !e.spent
		case *spentError, *Error, *ioError, *PanicError, *hookPanic, *ctxError, *inVain:
			return false
		case interface{ Unwrap() error }:
			err = e.Unwrap()
		case interface{ Unwrap() []error }:
			for _, one := range e.Unwrap() {
				if isKept(one) {
					return true
				}
			}
			return false
		case interface{ As(any) bool }:
			var k *keepError
			return e.As(&k) && k != nil && !k.spent
		default:
			return false
		}
	}
	return false
}

// unkeep is what an fn's error is reported as: without the wrapping of Keep, and
// with nothing in it that another verdict could take for a mark.
func unkeep(err error) error {
	for {
		k, ok := err.(*keepError)
		if !ok {
			return spent(err)
		}
		err = k.err
	}
}

// spent is err, behind a spentError if there is a mark in it.
func spent(err error) error {
	if isKept(err) {
		return &spentError{err}
	}
	return err
}
