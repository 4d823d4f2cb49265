package bench

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"math"
	"net"

	"github.com/jackc/puddle/v2"
	commons "github.com/jolestar/go-commons-pool/v2"
)

// --- puddle ---

type puddled struct {
	s *Settings
	p *puddle.Pool[*line]
}

func newPuddle(s *Settings) Rival {
	if s.Addrs > 1 {
		return newKeyed(s, newPuddle)
	}
	most := int32(s.Max)
	if most == 0 {
		most = math.MaxInt32
	}
	p, err := puddle.NewPool(&puddle.Config[*line]{
		Constructor: func(ctx context.Context) (*line, error) { return s.open(ctx, 0) },
		Destructor:  func(l *line) { l.Close() },
		MaxSize:     most,
	})
	if err != nil {
		panic(err) // only for a MaxSize below 1
	}
	return &puddled{s, p}
}

func (r *puddled) get(ctx context.Context) (*puddle.Resource[*line], error) {
	for {
		res, err := r.p.Acquire(ctx)
		if err != nil || res.Value().alive() {
			return res, err
		}
		res.Destroy()
	}
}

func (r *puddled) Loan(ctx context.Context, _ int) error {
	res, err := r.get(ctx)
	if err != nil {
		return err
	}
	res.Release()
	return nil
}

func (r *puddled) Exchange(ctx context.Context, _ int, x *Exchange) error {
	return r.with(ctx, func(l *line) error { return exchange(l.Conn, x) })
}

func (r *puddled) Hold(ctx context.Context, _ int, fn func(net.Conn) error) error {
	return r.with(ctx, func(l *line) error { return fn(l.Conn) })
}

func (r *puddled) with(ctx context.Context, fn func(*line) error) error {
	res, err := r.get(ctx)
	if err != nil {
		return err
	}
	if err := fn(res.Value()); err != nil {
		res.Destroy()
		return err
	}
	res.Release()
	return nil
}

func (r *puddled) Close() error {
	r.p.Close()
	return nil
}

// --- go-commons-pool ---

type common struct {
	p *commons.ObjectPool
}

func newCommons(s *Settings) Rival {
	if s.Addrs > 1 {
		return newKeyed(s, newCommons)
	}
	most := s.Max
	if most == 0 {
		most = -1
	}
	cfg := commons.NewDefaultPoolConfig() // LIFO, waits when exhausted
	cfg.MaxTotal, cfg.MaxIdle = most, most
	cfg.TestOnBorrow = s.Check != CheckNone
	factory := commons.NewPooledObjectFactory(
		func(ctx context.Context) (any, error) { return s.open(ctx, 0) },
		func(_ context.Context, o *commons.PooledObject) error { return o.Object.(*line).Close() },
		func(_ context.Context, o *commons.PooledObject) bool { return o.Object.(*line).alive() },
		nil, nil,
	)
	return &common{commons.NewObjectPool(context.Background(), factory, cfg)}
}

func (r *common) Loan(ctx context.Context, _ int) error {
	o, err := r.p.BorrowObject(ctx)
	if err != nil {
		return err
	}
	return r.p.ReturnObject(ctx, o)
}

func (r *common) Exchange(ctx context.Context, _ int, x *Exchange) error {
	return r.with(ctx, func(l *line) error { return exchange(l.Conn, x) })
}

func (r *common) Hold(ctx context.Context, _ int, fn func(net.Conn) error) error {
	return r.with(ctx, func(l *line) error { return fn(l.Conn) })
}

func (r *common) with(ctx context.Context, fn func(*line) error) error {
	o, err := r.p.BorrowObject(ctx)
	if err != nil {
		return err
	}
	if err := fn(o.(*line)); err != nil {
		return errors.Join(err, r.p.InvalidateObject(ctx, o))
	}
	return r.p.ReturnObject(ctx, o)
}

func (r *common) Close() error {
	r.p.Close(context.Background())
	return nil
}

// --- database/sql, over a driver that does nothing but hold a connection ---

type sqlPool struct{ db *sql.DB }

func newSQL(s *Settings) Rival {
	if s.Addrs > 1 {
		return newKeyed(s, newSQL)
	}
	db := sql.OpenDB(connector{s})
	db.SetMaxOpenConns(s.Max)
	db.SetMaxIdleConns(s.Max)
	if s.Max == 0 {
		db.SetMaxIdleConns(math.MaxInt32)
	}
	return sqlPool{db}
}

func (r sqlPool) Loan(ctx context.Context, _ int) error {
	c, err := r.db.Conn(ctx)
	if err != nil {
		return err
	}
	return c.Close()
}

func (r sqlPool) Exchange(ctx context.Context, _ int, x *Exchange) error {
	return r.with(ctx, func(l *line) error { return exchange(l.Conn, x) })
}

func (r sqlPool) Hold(ctx context.Context, _ int, fn func(net.Conn) error) error {
	return r.with(ctx, func(l *line) error { return fn(l.Conn) })
}

// with marks a connection on which fn failed as bad, as the package prescribes, and
// returns fn's error.
func (r sqlPool) with(ctx context.Context, fn func(*line) error) error {
	c, err := r.db.Conn(ctx)
	if err != nil {
		return err
	}
	var failure error
	err = c.Raw(func(dc any) error {
		if failure = fn(lineOf(dc)); failure != nil {
			return driver.ErrBadConn
		}
		return nil
	})
	if failure != nil {
		return failure
	}
	if err != nil {
		return err
	}
	return c.Close()
}

func (r sqlPool) Close() error { return r.db.Close() }

type connector struct{ s *Settings }

func (c connector) Connect(ctx context.Context) (driver.Conn, error) {
	l, err := c.s.open(ctx, 0)
	if err != nil {
		return nil, err
	}
	if c.s.Check != CheckNone {
		return &checkedDriverConn{driverConn{l}}, nil
	}
	return &driverConn{l}, nil
}

func (c connector) Driver() driver.Driver { return nil }

type driverConn struct{ *line }

var errNoSQL = errors.New("this driver knows no SQL")

func (*driverConn) Prepare(string) (driver.Stmt, error) { return nil, errNoSQL }
func (*driverConn) Begin() (driver.Tx, error)           { return nil, errNoSQL }

// checkedDriverConn peeks into the socket where drivers do: before a connection is used
// again.
type checkedDriverConn struct{ driverConn }

func (c *checkedDriverConn) ResetSession(context.Context) error {
	if !c.alive() {
		return driver.ErrBadConn
	}
	return nil
}

func lineOf(dc any) *line {
	if c, ok := dc.(*checkedDriverConn); ok {
		return c.line
	}
	return dc.(*driverConn).line
}
