package connpool

// How far a Keep mark reaches. A mark counts for the connection of the use whose fn
// returned it, and for no other. The error that With, Do or a use of a session returns
// goes to a caller that may itself be inside an outer fn. If the mark still counted
// there, the pool would keep the outer connection in the middle of an exchange. The mark
// itself cannot record that it was used, because it may be a package variable that is
// returned many times. So the pool wraps the error that it returns in a spentError.
// isKept stops at a spentError; errors.Is and errors.As see through it to everything
// except the mark.

// keepError is the mark that [Keep] makes.
type keepError struct {
	err   error
	spent bool // not a mark, but what errors.As finds in place of one behind a spentError
}

func (k *keepError) Error() string { return k.err.Error() }
func (k *keepError) Unwrap() error { return k.err }

// Keep wraps an error that leaves the connection in step: the peer answered "no such
// key", or rejected the request. fn returns Keep(err) to report err and have the
// connection go back to the pool. The mark may be wrapped, or joined with other errors.
// Keep(nil) is nil. Keep does not save a connection whose socket failed, that has unread
// or unflushed bytes, or whose ctx is done.
//
// A mark counts for the connection of the fn that returns it, and for no other. In an
// error that With or Do has returned, the mark no longer counts: if an outer fn returns
// that error, the pool closes the outer connection, unless the outer fn calls Keep
// itself.
func Keep(err error) error {
	if err == nil {
		return nil
	}
	return &keepError{err: err}
}

// spentError wraps an error whose marks have been used and no longer count.
type spentError struct{ err error }

func (e *spentError) Error() string      { return e.err.Error() }
func (e *spentError) Unwrap() error      { return e.err }
func (e *spentError) As(target any) bool { return hideKeepMark(target) }

// hideKeepMark answers an errors.As that looks for a mark, so that errors.As does not go on to
// a mark that no longer counts. isKept needs it where a foreign wrapper offers only an As
// method.
func hideKeepMark(target any) bool {
	k, ok := target.(**keepError)
	if ok {
		*k = &keepError{spent: true}
	}
	return ok
}

// isKept reports whether err, which an fn has returned, holds a mark that counts for this
// fn. The pool's own errors hold none: an error inside them comes from elsewhere, such as
// a Setup, the cause of a ctx or another use.
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

// unkeep returns the error that is reported for an fn's error: without the wrapper of
// Keep, and with any mark further in made spent.
func unkeep(err error) error {
	for {
		k, ok := err.(*keepError)
		if !ok {
			return spent(err)
		}
		err = k.err
	}
}

// spent returns err, wrapped in a spentError if err holds a mark.
func spent(err error) error {
	if isKept(err) {
		return &spentError{err}
	}
	return err
}
